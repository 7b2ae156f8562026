"""Attention matching for what follows a text: the latent stands for the first half of a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from latentwire_fast.objectives.attention_matching import AttentionMatching
from latentwire_fast.objectives.continuation import halves
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader


class AttentionContinued(AttentionMatching):
    """The queries are of the second half of the context, read behind the first."""

    @dataclass(frozen=True)
    class Config(AttentionMatching.Config):
        """Settings of attention matching for what follows a text: none but the common ones."""

    def prompt(self, prepared: PreparedItem, reader: Reader) -> Prompt:
        """The first half, and what follows it."""
        first, rest = halves(prepared.item.context)
        return reader.prompts.build_continued(first, rest or first)  # a single word has no halves

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """And a frozen encoder's states of the first half, which serve all readers."""
        first, _ = halves(prepared.item.context)
        states = self.model.encoder.kept_bytes(first) // len(self.model.cards)
        return super().kept_bytes(prepared, reader) + states

    def prefix(self, batch: ReaderBatch) -> Tensor:
        """Of the latents of the first halves."""
        firsts = tuple(halves(prepared.item.context)[0] for prepared in batch.items)
        half_BMd = batch.encoded.sent(firsts, None)
        return cast(Tensor, batch.model.deep_prefix(batch.reader.name, half_BMd))
