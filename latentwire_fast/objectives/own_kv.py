"""Keys and values at positions that the reader chooses itself, for a reader that is added later.

The positions that an encoder chose for other readers may not be those at which this one keeps what
it answers from. With its own keys and values at them a third reader of the testbed (`mistral`) has
10% of the answers right, at 8 and 16 of its own 52% and 85% (text 92%). The positions are needed in
training only. What it is worth there: so far less than `kv`, whose target latents can tell
(docs/results.md, "A third reader").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.objectives.kv import KV
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.readers.reader import Reader


class OwnKV(KV):
    """As `kv`, at the positions of the text that the reader's answers attend to most.

    As many as the deep prefix has (`length`, or one per latent), in the order of the text. The
    encoder may have any pooler.
    """

    needs_positions = False

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of a reader's own keys and values: their weight alone."""

        reads_answers: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless there is a prefix that holds keys and values."""
            require(run.gives("deep"), f"objective {self.kind!r} needs an attachment 'deep'")

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        prepared.text_prompt(reader)
        return 1

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """Nothing: whose positions are asked for has read the text already."""
        return 0

    def places(self, batch: ReaderBatch) -> Tensor:
        """The reader's positions `[B, P]`."""
        prompts = batch.reader.prompts
        attention_BT = batch.observation.attention_BT[:, prompts.content_start :]
        length = cast(Tensor, batch.inputs["deep"]).shape[4] - batch.inputs["head"]
        rows = []
        for prepared, attention_T in zip(batch.items, attention_BT, strict=True):
            text = encoded_text(prepared.item.context, prepared.question)
            rows.append(most_attended(attention_T[: len(prompts.text_ends(text))], length))
        return prompts.content_start + torch.stack(rows)


def most_attended(attention_T: Tensor, length: int) -> Tensor:
    """The positions `[length]` of a text with the most attention, in its order; a shorter text
    gives its last one again."""
    count = len(attention_T)
    best = attention_T.topk(min(length, count)).indices.sort().values
    return torch.cat([best, best.new_full((length - len(best),), count - 1)])
