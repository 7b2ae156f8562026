"""A run's configuration: whether it is the folder's, and the model and data that it stands for.

A run goes on from any working directory, so its local paths are made absolute. What names something
else stays as it is: `testbed:llama`, a hub id, `hub:squad`. What exists as a path is taken for a
path, as transformers does.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentwire_fast.config.schema import Mode, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.data.source_names import map_paths, split_shares, split_union
from latentwire_fast.data.sources import (
    check_apart,
    check_contexts,
    draw_contexts,
    endless_stream,
    load_examples,
    split_validation,
)
from latentwire_fast.data.streams import ExampleStream, Stream, TrainItem
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.encoders.base import Encoder, build_encoder
from latentwire_fast.models.encoders.truncation import measure_truncation
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.context_limit import ContextLimit
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS, OBJECTIVES
from latentwire_fast.training.warm_start import warm_start

logger = logging.getLogger(__name__)

VALIDATION_SEED = 1 << 40  # beyond the seeds that people give
ENDLESS_SAMPLE = 300  # answers of an endless stream that are checked


def absolute_paths(config: RunConfig) -> RunConfig:
    """A configuration whose readers, encoder, data and base are found from anywhere.

    Raises:
        DataError: the absolute path of a data file holds a comma, which separates sources.
    """
    readers = {
        name: replace(reader, source=_absolute(reader.source))
        for name, reader in config.readers.items()
    }
    encoder = config.encoder.map_sources(_absolute)
    data = replace(config.data, source=map_paths(config.data.source, _absolute))
    if data.eval_source is not None:
        data = replace(data, eval_source=map_paths(data.eval_source, _absolute))
    evaluation = config.evaluation
    if evaluation.continuation is not None:
        place = map_paths(evaluation.continuation.source, _absolute)
        evaluation = replace(
            evaluation, continuation=replace(evaluation.continuation, source=place)
        )
    return replace(
        config,
        stages=tuple(map(_absolute_stage, config.stages)),
        readers=readers,
        encoder=encoder,
        data=data,
        evaluation=evaluation,
        base=None if config.base is None else _absolute(config.base),
        warm_start={part: _absolute(run) for part, run in config.warm_start.items()},
    )


def _absolute_stage(stage: StageConfig) -> StageConfig:
    """A stage whose data and whose objectives' models are found from anywhere."""
    objectives = tuple(objective.map_sources(_absolute) for objective in stage.objectives)
    source = None if stage.source is None else map_paths(stage.source, _absolute)
    return replace(stage, objectives=objectives, source=source)


def _absolute(source: str) -> str:
    # Not `resolve`: a link may be the name under which a user moves a model about.
    return os.path.abspath(source) if Path(source).exists() else source  # noqa: PTH100


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


def build_model(
    config: RunConfig,
    readers: dict[str, Reader],
    contexts: Sequence[str] = (),
    fitted: Sequence[TrainItem] = (),
) -> Interlingua:
    """A model for these readers, fresh but for the encoder of a base. Readers whose low-rank
    updates are to be trained read with them from now on.

    Args:
        contexts: a few texts of the training data, which attachments may start from.
        fitted: items of the training data that a fresh encoder is fitted to.

    Raises:
        ConfigError: the base does not fit the configuration, or has adapters for these readers; a
            reader that takes no soft tokens, or no deep prefix, where it is to be given some.
        CheckpointError: it is not trained.
    """
    for reader in readers.values():
        for attachment in config.attachments:
            reader.require(ATTACHMENTS.part_of(attachment).gives)
    base = None if config.base is None else _base_model(config, config.base, readers)
    model = Interlingua(
        _fresh_encoder(config, readers) if base is None else base.encoder,
        {name: ReaderCard.of(reader) for name, reader in readers.items()},
        bottleneck=config.bottleneck,
        attachments=config.attachments,
        mode=config.mode,
        private_slots=config.private_slots,
    )
    if base is not None:
        model.bottleneck = base.bottleneck
    if fitted:
        model.encoder.to(next(iter(readers.values())).device)  # where it will be trained
        questions = [item.question for item in fitted] if config.mode == "pure" else None
        model.encoder.fit([item.context for item in fitted], questions)
    for name, reader in readers.items():
        for part in model.parts(name).values():
            part.start(reader, mode=config.mode, contexts=contexts)
    for name, reader in readers.items():  # the last to be made: the encoder may begin as a copy
        if reader.lora_settings is not None:
            model.lora[name] = ReaderLora.fresh(reader, reader.lora_settings)
    for place, run in config.warm_start.items():
        warm_start(model, place, Path(run))
    _add_heads(model, config, readers)
    return model


def _add_heads(model: Interlingua, config: RunConfig, readers: dict[str, Reader]) -> None:
    """Make what the objectives of the stages train beside the model: the last to be drawn, so that
    the model begins as it would without them."""
    for stage in config.stages:
        for objective in stage.objectives:
            if objective.kind not in model.heads:
                part = OBJECTIVES.part_of(objective)
                head = part.build_head(objective, model, readers)
                if head is not None:
                    model.heads[objective.kind] = head


def _fresh_encoder(config: RunConfig, readers: dict[str, Reader]) -> Encoder:
    try:
        return build_encoder(config.encoder, readers)
    except ConfigError as error:  # most of its settings are the preset's, not the user's
        raise ConfigError(f"preset {config.preset!r}: {error}") from error


def _base_model(config: RunConfig, base: str, readers: dict[str, Reader]) -> Interlingua:
    """The model of a base, its encoder and bottleneck as they stay."""
    model = Interlingua.from_pretrained(RunFolder(Path(base)).model)
    kept = config.bottleneck, config.mode
    fits = config.encoder.allows(model.encoder_config)
    if not fits or (model.bottleneck_config, model.mode) != kept:
        raise ConfigError(
            f"this run has another encoder, bottleneck or mode than its base {base}, which it keeps"
        )
    if model.slots.private != config.private_slots:
        raise ConfigError(
            f"private_slots={config.private_slots}, and those of the base {base}, which are kept, "
            f"are {dict(model.slots.private)}"
        )
    for name in readers:
        if name in config.private_slots:
            raise ConfigError(
                f"{base} has slots that are for its reader {name!r} alone; give the added reader "
                "another name"
            )
    served = {card.fingerprint: name for name, card in model.cards.items()}
    for name, reader in readers.items():
        if reader.fingerprint in served:
            raise ConfigError(
                f"{base} has learned with reader {name!r} ({served[reader.fingerprint]!r} there); "
                "name the readers to add with --reader"
            )
    model.encoder.requires_grad_(False)
    model.bottleneck.requires_grad_(False)
    return model


@dataclass(frozen=True)
class RunData:
    """What a run learns from.

    Attributes:
        stream: where its batches come from.
        by_source: streams of those pieces of the source that stages name.
        validation: the slice that it validates on: never trained on, and not of the held-out
            examples that it is evaluated on. Empty where it does not validate.
    """

    stream: Stream
    validation: list[Example]
    by_source: Mapping[str, Stream] = field(default_factory=dict)

    def stream_of(self, stage: StageConfig) -> Stream:
        """Where a stage's batches come from."""
        return self.stream if stage.source is None else self.by_source[stage.source]


def build_data(config: RunConfig, readers: dict[str, Reader]) -> RunData:
    """Training data and the validation's slice, their answers checked (a sample of those that have
    no end).

    Of a finite source the slice are examples on some contexts of its training part
    (`split_validation`), which the stream leaves out. Of a source without end they are held-out
    examples of a seed of their own.

    Raises:
        ConfigError: as `check_answers`.
        DataError: as `load_examples`, `split_validation` and `check_apart`, or a stage that finds
            nothing to learn from the data.
    """
    data = config.data
    endless = endless_stream(data, mode=config.mode, seed=config.seed)
    count = None if endless is None else ENDLESS_SAMPLE
    limit = ContextLimit(readers, data.max_context_tokens)
    examples = load_examples(
        data.source, split="train", count=count, seed=config.seed, data=data, keep=limit.fits
    )
    limit.report(data.source)
    check_contexts(examples, mode=config.mode, source=data.source)
    check_answers(examples, readers, source=data.source)
    named = named_sources(config)
    if endless is not None:  # it is one source
        by_source: dict[str, Stream] = dict.fromkeys(named, endless)
        return RunData(endless, _validation_of_endless(config, readers), by_source)
    validation: list[Example] = []
    if config.validation is not None:
        examples, validation = split_validation(examples, config.validation.examples)
    _check_evaluation(examples, config)
    examples = draw_contexts(examples, data.train_contexts, seed=config.seed)
    stream = ExampleStream(examples, data, mode=config.mode, seed=config.seed)
    known = {example.context for example in examples}  # neither validated on nor left out
    by_source = {}
    for source in named:
        found = load_examples(
            source, split="train", count=None, seed=config.seed, data=data, keep=limit.fits
        )
        found = [example for example in found if example.context in known]
        by_source[source] = ExampleStream(found, data, mode=config.mode, seed=config.seed)
    result = RunData(stream, validation, by_source)
    for stage in config.stages:
        of_stage = result.stream_of(stage)
        assert isinstance(of_stage, ExampleStream)
        if not (of_stage.items or stage.takes_texts):
            raise DataError(
                f"{stage.source or data.source} has no questions, and stage {stage.name!r} learns "
                "from nothing else; add a source with questions, or leave out the stage"
            )
    return result


def named_sources(config: RunConfig) -> list[str]:
    """The pieces of the run's source that stages name.

    Raises:
        ConfigError: one of them is no piece of it.
    """
    source = config.data.source
    pieces = [piece for part in split_shares(source) for piece in split_union(part)]
    named = [stage.source for stage in config.stages if stage.source is not None]
    for name in named:
        if name not in pieces:
            raise ConfigError(
                f"stages: source={name!r} is none of the pieces of data.source, which are "
                f"{', '.join(pieces)}; add it there: all that is trained on is checked against "
                "what the run is scored on"
            )
    return list(dict.fromkeys(named))


def _validation_of_endless(config: RunConfig, readers: dict[str, Reader]) -> list[Example]:
    if config.validation is None:
        return []
    data, count = config.data, config.validation.examples
    seed = VALIDATION_SEED + data.eval_seed
    examples = load_examples(data.source, split="heldout", count=count, seed=seed, data=data)
    check_answers(examples, readers, source=f"{data.source} (validation)")
    return examples


def _check_evaluation(training: list[Example], config: RunConfig) -> None:
    """Raise unless all that the run is scored on is kept out of its training.

    All of a file, not only as many examples as are asked for: another seed takes others.
    """
    data, continuation = config.data, config.evaluation.continuation
    sources = [data.eval_source, None if continuation is None else continuation.source]
    for source in sources:
        if source is None:
            continue
        is_endless = endless_stream(replace(data, source=source), mode=config.mode, seed=0)
        count = data.eval_examples if is_endless else None
        everything = load_examples(
            source, split="heldout", count=count, seed=0, data=data, whole=True
        )
        check_apart(training, everything, source=data.source, eval_source=source)


def warn_of_truncation(encoder: Encoder, stream: Stream, mode: Mode) -> None:
    """Say once how much of a finite data set training will not see."""
    if isinstance(stream, ExampleStream):
        texts = [(item.context, turn.question) for item in stream.items for turn in item.turns]
        texts += [(item.context, "") for item in stream.texts]
        truncation = measure_truncation(encoder, texts, mode=mode)
        if truncation.cut:
            logger.warning("training data: %s. Raise that limit, or split the passages", truncation)
