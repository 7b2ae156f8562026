"""A run's configuration: whether it is the folder's, and the model and data that it stands for."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

from latentwire_fast.config.schema import Mode, RunConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.sources import endless_stream, load_examples
from latentwire_fast.data.streams import ExampleStream, Stream
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.models.encoders.build import build_encoder
from latentwire_fast.models.encoders.lm import Encoder
from latentwire_fast.models.encoders.truncation import measure_truncation
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.training.local_paths import absolute_paths

logger = logging.getLogger(__name__)

ENDLESS_SAMPLE = 300  # answers of an endless stream that are checked


def check_stored_config(path: Path, config: RunConfig) -> None:
    """Raise unless a run's config.json, where there is one, says the same as `config`.

    Raises:
        ConfigError: another configuration, or no JSON.
    """
    if not path.exists():
        return
    stored = read_json(path, error=ConfigError)
    with contextlib.suppress(ConfigError):  # another version's is compared as it is
        stored = to_json(absolute_paths(run_config_from_json(stored)))
    wanted = to_json(config)
    stored = stored if isinstance(stored, dict) else {}
    differ = sorted(k for k in wanted | stored if stored.get(k) != wanted.get(k))
    if differ:
        raise ConfigError(
            f"{path} is of a run with another configuration (differs in "
            f"{', '.join(differ)}); choose another --run folder, or remove this one"
        )


def build_model(config: RunConfig, readers: dict[str, Reader]) -> Interlingua:
    """A model for these readers, fresh but for the encoder of a base.

    Raises:
        ConfigError: the base does not fit the configuration, or has adapters for these readers.
        CheckpointError: it is not trained.
    """
    encoder = (
        build_encoder(config.encoder, readers)
        if config.base is None
        else _base_encoder(config, config.base, readers)
    )
    return Interlingua(
        encoder,
        {name: ReaderCard.of(reader) for name, reader in readers.items()},
        encoder_config=encoder.config,
        quantizer=config.quantizer,
        adapter=config.adapter,
        mode=config.mode,
    )


def _base_encoder(config: RunConfig, base: str, readers: dict[str, Reader]) -> Encoder:
    model = Interlingua.from_pretrained(Path(base) / "model")
    # An encoder may read less than it was asked to.
    asked = replace(config.encoder, max_tokens=model.encoder_config.max_tokens)
    if (model.encoder_config, model.quantizer, model.mode) != (
        asked,
        config.quantizer,
        config.mode,
    ):
        raise ConfigError(
            f"this run has another encoder, quantizer or mode than its base {base}, which it keeps"
        )
    served = {card.fingerprint: name for name, card in model.cards.items()}
    for name, reader in readers.items():
        if reader.fingerprint in served:
            raise ConfigError(
                f"{base} has learned with reader {name!r} ({served[reader.fingerprint]!r} there); "
                "name the readers to add with --reader"
            )
    return model.encoder.requires_grad_(False)


def build_stream(config: RunConfig, readers: dict[str, Reader]) -> Stream:
    """Training data, its answers checked (a sample of those that have no end).

    Raises:
        ConfigError: as `check_answers`.
    """
    endless = endless_stream(config.data, mode=config.mode, seed=config.seed)
    count = None if endless is None else ENDLESS_SAMPLE
    examples = load_examples(config.data.source, split="train", count=count, seed=config.seed)
    check_answers(examples, readers, source=config.data.source)
    if endless is not None:
        return endless
    return ExampleStream(examples, config.data, mode=config.mode, seed=config.seed)


def warn_of_truncation(encoder: Encoder, stream: Stream, mode: Mode) -> None:
    """Say once how much of a finite data set training will not see."""
    if isinstance(stream, ExampleStream):
        texts = ((item.context, turn.question) for item in stream.items for turn in item.turns)
        truncation = measure_truncation(encoder, texts, mode=mode)
        if truncation.cut:
            logger.warning("training data: %s. Raise that limit, or split the passages", truncation)
