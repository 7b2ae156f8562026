"""Rows of the Hugging Face hub; without a network, from its cache or not at all, within seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from latentwire_fast.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SECONDS = 4.0  # to wait for the hub's first answer; `datasets` would try for half a minute


def load_from_hub(
    path: str, subset: str | None, *, split: str, streaming: bool, advice: str
) -> Dataset | IterableDataset:
    """The rows of one split.

    Args:
        advice: what to do without a network, for the message.

    Raises:
        DataError: they cannot be loaded.
    """
    import datasets

    def load() -> Dataset | IterableDataset:
        return datasets.load_dataset(path, subset, split=split, streaming=streaming)

    is_silent = not (is_offline() or hub_answers())
    try:
        with _offline() if is_silent else nullcontext():
            return load()
    except (OSError, ValueError) as error:
        reason = "the hub does not answer, and its cache has no copy" if is_silent else str(error)
        raise DataError(
            f"hub data set {path!r}, split {split!r}, cannot be loaded ({reason}); without a "
            f"network, {advice}"
        ) from error


def is_offline() -> bool:
    """Whether the user said that there is no network (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_answers() -> bool:
    """Whether the hub answers within `SECONDS`."""
    from huggingface_hub import constants, get_session

    answered = threading.Event()

    def ask() -> None:
        # Errors are of whichever HTTP library this version of huggingface_hub has.
        with suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answered.set()

    # A thread, because no timeout counts while a name is looked up.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()


@contextmanager
def _offline() -> Iterator[None]:
    """The libraries look into their caches only."""
    import datasets
    from huggingface_hub import constants

    settings = (datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")
    before = [getattr(module, name) for module, name in settings]
    for module, name in settings:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(settings, before, strict=True):
            setattr(module, name, value)
