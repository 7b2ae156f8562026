"""Scheduled sampling: a reader learns to go on from what it says itself.

Shapes: N tokens of answers, D the reader's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader


class Sampled(Objective):
    """Cross-entropy over the answers' tokens, where the reader reads its own most probable tokens
    in the place of some of the true ones.

    Its own tokens are those of the pass behind the true ones: two passes in the place of one for
    each token (Mihaylova and Martins 2019). What it is to say stays the true token. A token that
    ends an answer is not read: nothing follows it.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of scheduled sampling.

        Attributes:
            share: of the answers' tokens that are the reader's own; a schedule may raise it.
            tokens: how many tokens of each answer count; None: all of them and EOS.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        share: float = 0.25
        tokens: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("tokens")
            require(
                0 <= self.share <= 1,
                f"objective {self.kind!r}: share={self.share}, expected in [0, 1]",
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        return count_targets(prepared.latent_prompt(reader), self.config.tokens)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The cross-entropy, summed over tokens; also reports how many are then right."""
        reader, answers = batch.reader, batch.answers
        own_N = _most_probable(reader, answers.hidden_ND)
        is_drawn_N = torch.rand(len(own_N)) < self.config.share
        kept = torch.tensor([token not in reader.stop_ids for token in own_N.tolist()])
        prompts = _with_tokens(batch.prompts("latent"), own_N, is_drawn_N & kept)
        read = reader.collate(prompts, **batch.prompt_inputs)
        counts_N = answers.first_N(self.config.tokens)
        losses = reader.output_head.losses(
            reader.target_hidden(read)[counts_N],
            answers.batch.labels_N[counts_N],
            cross_entropy_gradient=self.config.weight != 0,
        )
        batch.report("sampled_accuracy", losses.correct)
        return losses.cross_entropy


@torch.no_grad()
def _most_probable(reader: Reader, hidden_ND: Tensor) -> Tensor:
    """The most probable token `[N]` at each place."""
    head = reader.output_head
    return torch.cat([head.logits(part).argmax(-1) for (part,) in head.chunks(hidden_ND)])


def _with_tokens(prompts: Sequence[Prompt], ids_N: Tensor, is_drawn_N: Tensor) -> list[Prompt]:
    """Prompts whose answers' tokens are replaced where they are drawn; N counts the tokens of all
    prompts, one behind another."""
    drawn = iter(zip(ids_N.tolist(), is_drawn_N.tolist(), strict=True))
    result = []
    for prompt in prompts:
        ids = [*prompt.ids]
        for i, is_target in enumerate(prompt.is_target):
            if not is_target:
                continue
            token, is_drawn = next(drawn)
            is_last = not any(prompt.is_target[i + 1 : i + 2])  # it ends its answer
            if is_drawn and not is_last:
                ids[i] = token
        result.append(replace(prompt, ids=ids))
    return result
