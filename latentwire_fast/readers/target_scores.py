"""Log-probabilities of given answers: the result of one teacher-forced pass.

Shapes: N answer tokens of all prompts, V vocabulary, D the reader's width, K ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from latentwire_fast.readers.output_head import OutputHead


@dataclass(frozen=True)
class TargetScores:
    """Log-probabilities at the positions that predict the prompts' answers and their EOS.

    They are made when they are asked for: `gold_N` and `ranked_NK` never hold `[N, V]`.

    Attributes:
        hidden_ND: last hidden states at those positions.
        head: what makes logits of them.
        labels_N: the answer's own tokens.
        rows_N: index of the prompt that each belongs to, ascending.
        step_N: index of the token within its answer; with several turns each begins at 0.
        prompts: how many prompts there were.
    """

    hidden_ND: Tensor
    head: OutputHead
    labels_N: Tensor
    rows_N: Tensor
    step_N: Tensor
    prompts: int

    @cached_property
    def logprobs_NV(self) -> Tensor:
        """fp32, of every token of the vocabulary, all at once."""
        return self.head.logits(self.hidden_ND).log_softmax(-1)

    @cached_property
    def gold_N(self) -> Tensor:
        """Log-probabilities of the answer's own tokens; differentiable."""
        return -self.head.losses(self.hidden_ND, self.labels_N, reduction="none").cross_entropy

    def ranked_NK(self, count: int) -> Tensor:
        """Ids of the `count` most probable tokens, best first."""
        count = min(count, len(self.head.weight))
        return self.head.by_chunks(self.hidden_ND, lambda z_nV: z_nV.topk(count, -1).indices)

    def by_prompt(self, values_N: Tensor) -> list[Tensor]:
        """Values of each prompt's answer tokens; none of a prompt without an answer."""
        sizes = self.rows_N.bincount(minlength=self.prompts).tolist()
        return list(values_N.split(sizes))

    @property
    def mean_gold_B(self) -> Tensor:
        """Mean log-probability per token of each prompt's answer; NaN without an answer."""
        gold_N = self.gold_N
        rows_N = self.rows_N.to(gold_N.device)
        sums_B = gold_N.new_zeros(self.prompts).index_add_(0, rows_N, gold_N)
        return sums_B / rows_N.bincount(minlength=self.prompts)
