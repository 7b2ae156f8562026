"""Answers behind gist tokens: what these, and the reader's low-rank updates, are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.objectives.text_answers import KIND, TextAnswers
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.gists import Gists, gist_prompt
from latentwire_fast.readers.reader import Reader


class GistAnswers(TextAnswers):
    """Cross-entropy over the answers behind context and gist tokens, without a view of the context.

    Args:
        reader: with the gist tokens' low-rank updates.
    """

    def __init__(self, reader: Reader, gists: Gists) -> None:
        super().__init__({reader.name: reader})
        self.gists = gists

    def prompt(self, prepared: PreparedItem, reader: Reader) -> Prompt:
        """The item's questions and answers behind the context and the gist tokens' place."""
        item, builder = prepared.item, reader.prompts
        return prepared.prompt(KIND, reader, lambda: gist_prompt(builder, item.turns, item.context))

    def target_hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, D]` at the positions that predict answer tokens, and those tokens."""
        return self.gists.target_hidden(reader, prompts)
