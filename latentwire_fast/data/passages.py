"""The passages of a source, each once: what a payload store is made of."""

from __future__ import annotations

from latentwire_fast.data.source_names import is_built_in
from latentwire_fast.data.sources import load_examples
from latentwire_fast.errors import DataError


def load_passages(spec: str, *, count: int | None = None) -> dict[str, str]:
    """The different contexts of a source by id, in an order that is always the same.

    A context that several questions are about has the id of the first of them.

    Args:
        spec: the source, as in `source_names.py`. Of a set that is made without end, the held-out
            passages.
        count: at most so many.

    Raises:
        DataError: as `load_examples`; or a set without end, and no count.
    """
    endless = is_built_in(spec)
    if count is not None and count < 1:
        raise DataError(f"{count} passages asked for, expected at least 1")
    if endless and count is None:
        raise DataError(f"{spec} has no end; say how many passages you want (--passages N)")
    examples = load_examples(
        spec, split="heldout" if endless else "all", count=count if endless else None, seed=0
    )
    id_of: dict[str, str] = {}
    for example in examples:
        id_of.setdefault(example.context, example.id)
    passages = {identifier: context for context, identifier in id_of.items()}
    return dict(list(passages.items())[:count])
