"""Embeddings of the answer: soft tokens begin as the embeddings of what the reader is to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import Mode, ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader


class Embed(Objective):
    """Squared distance of the first soft tokens to the embeddings of the answer and its EOS.

    Relative to the mean square of the reader's embeddings. For pure mode, whose latent may hold an
    answer.
    """

    counted = "embeddings"

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the answers' embeddings: their weight alone."""

        modes: ClassVar[tuple[Mode, ...]] = ("pure",)
        reads_answers: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless latents become soft tokens."""
            require(
                run.gives("prefixes"),
                f"objective {self.kind!r} needs an attachment 'soft'",
            )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts embeddings."""

        def answer() -> Prompt:
            prompt = Prompt()
            ids = reader.prompts.target_ids(prepared.item.turns[0].answer or "")
            prompt.add(ids[: self.model.slots.count(reader.name)], target=True)
            return prompt

        return count_targets(prepared.prompt("answer", reader, answer))

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The distance, summed over embeddings; of a long answer so many as there are latents."""
        reader, sent_BMd = batch.reader, batch.encoded.sent_BMd
        answers = [prompt.ids for prompt in batch.prompts("answer")]
        places = [(b, m) for b, ids in enumerate(answers) for m in range(len(ids))]
        rows_N, slots_N = torch.tensor(places, device=sent_BMd.device).unbind(1)
        ids_N = torch.tensor([i for ids in answers for i in ids], device=reader.device)
        target_ND = reader.embedding(ids_N).to(sent_BMd)
        error_ND = (batch.inputs["prefixes"][rows_N, slots_N] - target_ND) / reader.embedding_rms
        return error_ND.pow(2).mean(-1).sum()
