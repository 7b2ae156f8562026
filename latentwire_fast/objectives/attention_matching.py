"""Attention matching: a deep prefix gives a reader's attention what a text gives it.

Shapes: B texts, L layers, H key/value heads, Q queries of each, M latents, D head width.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import Mode, ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.attention_targets import AttentionQuestion
from latentwire_fast.readers.reader import Reader


class AttentionMatching(Objective):
    """Distance of a deep prefix's attention to that of the text it stands for, per layer and head.

    Of attention over the text's positions alone, the outputs count (their squared error, relative
    to their mean square) and the log-masses (their squared difference), since a reader attends to
    more than the text. The reader runs once for each text, without a backward pass.

    A subclass says which text, and what stands behind it: the queries are of that.
    """

    counted = "texts"

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of attention matching.

        Attributes:
            queries: for each text.
            mass: weight of the log-masses.
        """

        modes: ClassVar[tuple[Mode, ...]] = ("context",)

        queries: int = 24
        mass: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("queries")
            require(self.mass >= 0, f"objective {self.kind!r}: mass={self.mass}, expected >= 0")

        def check(self, run: RunConfig) -> None:
            """Raise unless there is a deep prefix."""
            require(
                run.gives("deep"),
                f"objective {self.kind!r} teaches an attachment 'deep'; add one, or leave it out",
            )

    config: Config

    @abstractmethod
    def prompt(self, prepared: PreparedItem, reader: Reader) -> Prompt:
        """The text and what stands behind it, the same in every epoch: the targets can be kept."""

    @abstractmethod
    def prefix(self, batch: ReaderBatch) -> Tensor:
        """The deep prefixes `[L, 2, B, H, P, D]` of the texts' latents, with what is in front."""

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        prepared.prompt(self.config.kind, reader, lambda: self.prompt(prepared, reader))
        return 1

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """Queries, outputs and masses, fp16."""
        g = reader.kv_geometry
        heads = reader.model.config.get_text_config(decoder=True).num_attention_heads
        return 2 * g.layers * heads * self.config.queries * (2 * g.head_width + 1)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The distance, summed over texts."""
        prefix_L2BHMD = self.prefix(batch)[..., batch.inputs["head"] :, :]
        slots = prefix_L2BHMD.shape[4]
        questions = [
            self._question(prompt, reader=batch.reader, slots=slots)
            for prompt in batch.prompts(self.config.kind)
        ]
        cap = getattr(batch.reader.model.config.get_text_config(), "attn_logit_softcapping", None)
        outputs_B, masses_B = attention_errors(
            prefix_L2BHMD.float(), batch.attention_targets(questions), softcap=cap
        )
        batch.report(f"{self.config.kind}_outputs", outputs_B.detach().sum())
        return (outputs_B + self.config.mass * masses_B).sum()

    def _question(self, prompt: Prompt, *, reader: Reader, slots: int) -> AttentionQuestion:
        """The queries of a prompt: a quarter predict answers, if it has any."""
        start = reader.prompts.content_start + len(reader.prompts.label_ids)
        stop = start + prompt.content
        rng = random.Random(str(prompt.ids))
        answers = [i - 1 for i, target in enumerate(prompt.is_target) if target]
        chosen = rng.sample(answers, min(self.config.queries // 4, len(answers)))
        others = range(stop, len(prompt.ids))
        chosen += rng.choices(others, k=self.config.queries - len(chosen))
        return AttentionQuestion(prompt, start, stop, tuple(chosen), slots)


def attention_errors(
    prefix_L2BHMD: Tensor, targets: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Errors of a prefix's attention `[B]`, means over layers, heads and queries: of the outputs,
    relative to their mean square in each head, and of the log-masses.

    Args:
        prefix_L2BHMD: keys and values, fp32.
        targets: `[B, L, H, Q, 2 D + 1]`, see `attention_targets`.
        softcap: of the reader's scores, if it has one.
    """
    keys_BLHMD, values_BLHMD = (side.transpose(0, 1) for side in prefix_L2BHMD.unbind(1))
    width = keys_BLHMD.shape[-1]
    query_BLHQD, wanted_BLHQD, mass_BLHQ1 = targets.to(prefix_L2BHMD).split([width, width, 1], -1)
    scores_BLHQM = query_BLHQD @ keys_BLHMD.mT
    if softcap is not None:
        scores_BLHQM = softcap * (scores_BLHQM / softcap).tanh()
    outputs_BLHQD = scores_BLHQM.softmax(-1) @ values_BLHMD
    seen_BLHQ1 = mass_BLHQ1.isfinite()
    mass_error = torch.where(
        seen_BLHQ1, scores_BLHQM.logsumexp(-1, keepdim=True) - mass_BLHQ1, 0.0
    ).square()
    square_BLHQ1 = (outputs_BLHQD - wanted_BLHQD).square().mean(-1, keepdim=True)
    size_BLH11 = wanted_BLHQD.square().mean((-2, -1), keepdim=True).clamp(min=1e-8)
    error = square_BLHQ1 * seen_BLHQ1 / size_BLH11
    return error.mean((1, 2, 3, 4)), mass_error.mean((1, 2, 3, 4))
