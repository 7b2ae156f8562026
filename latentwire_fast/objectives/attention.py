"""Attention matching for questions on a text, and for the text read a second time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from latentwire_fast.objectives.attention_matching import AttentionMatching
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader


class Attention(AttentionMatching):
    """The queries are of questions and answers behind the text, and of the text read again."""

    @dataclass(frozen=True)
    class Config(AttentionMatching.Config):
        """Settings of attention matching for questions.

        Attributes:
            questions: how many of the questions on a text are asked, with their answers, at most.
            again: how many tokens of the text are read a second time, at most.
        """

        questions: int = 3
        again: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("questions", "again")

    config: Config

    def prompt(self, prepared: PreparedItem, reader: Reader) -> Prompt:
        """The text, some of its questions, and a part of it again."""
        item = prepared.item
        rng = random.Random(item.context)
        return reader.prompts.build_again(
            self._some(item.turns, rng), context=item.context, tokens=self.config.again, rng=rng
        )

    def _some(self, turns: Sequence[Turn], rng: random.Random) -> list[Turn]:
        """Some of the questions, in their order."""
        chosen = rng.sample(range(len(turns)), min(self.config.questions, len(turns)))
        return [turns[i] for i in sorted(chosen)]

    def prefix(self, batch: ReaderBatch) -> Tensor:
        """Of the items' own latents."""
        return cast(Tensor, batch.inputs["deep"])
