"""Examples whose context is too long for a run: left out, and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from latentwire_fast.data.examples import Example
from latentwire_fast.prompts.builder import context_text
from latentwire_fast.readers.reader import Reader

logger = logging.getLogger(__name__)


class ContextLimit:
    """Whether contexts have at most so many tokens, in the tokenizer of every reader.

    A context is left out rather than cut: what a question is about may stand in the rest.

    Args:
        tokens: the limit; None for none.
    """

    def __init__(self, readers: Mapping[str, Reader], tokens: int | None) -> None:
        self._readers = readers
        self._tokens = tokens
        self._known: dict[str, bool] = {}

    def fits(self, example: Example) -> bool:
        """Whether an example's context is short enough."""
        if self._tokens is None:
            return True
        if example.context not in self._known:
            text = context_text(example.context)
            longest = max(len(r.prompts.text_ids(text)) for r in self._readers.values())
            self._known[example.context] = longest <= self._tokens
        return self._known[example.context]

    def report(self, source: str) -> None:
        """Log how many of the contexts so far were too long."""
        out = len(self._known) - sum(self._known.values())
        if out:
            logger.warning(
                "%s: %d of %d contexts have more than %d tokens (max_context_tokens) and are left "
                "out, with their questions",
                source,
                out,
                len(self._known),
                self._tokens,
            )
