"""Pretrained weights: all of them come from the files, or there is no model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from latentwire_fast.errors import ConfigError

logger = logging.getLogger(__name__)

NAMED = 3  # tensors that a message names


def complete_model(kind: Any, path: str | Path, *, source: str | Path, **options: Any) -> Any:
    """A model of an `AutoModel` kind, as `from_pretrained` of a path makes it.

    Args:
        source: what messages call it.
        options: of `from_pretrained`.

    Raises:
        ConfigError: not all weights of the model are there.
    """
    with quiet_transformers():
        model, found = kind.from_pretrained(
            path,
            trust_remote_code=False,  # unsaid, it would be asked for on the terminal
            ignore_mismatched_sizes=True,  # so that `found` lists them
            output_loading_info=True,
            **options,
        )
    _check_complete(model, found, source)
    return model


def _check_complete(model: PreTrainedModel, found: Mapping[str, Any], source: str | Path) -> None:
    """Raise unless every weight came from the files: transformers draws the others at random."""
    name = type(model).__name__
    wrong = sorted(f"{key} is missing" for key in found["missing_keys"])
    wrong += sorted(
        f"{key} is {tuple(saved)}, not {tuple(wanted)}"
        for key, saved, wanted in found["mismatched_keys"]
    )
    if wrong:
        raise ConfigError(
            f"{str(source)!r} does not hold the weights of a {name}: {_first(wrong)}; save the "
            "model again with `save_pretrained`, or correct its config.json"
        )
    unused = sorted(found["unexpected_keys"])
    if unused and model.base_model is not model:  # a model without a head leaves out the head's
        logger.warning("%s: left out, not part of a %s: %s", source, name, _first(unused))


def _first(items: Sequence[str]) -> str:
    """A few of them, and how many there are."""
    rest = f", ... ({len(items)} in all)" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + rest


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own table of what it did not find; `complete_model` says it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
