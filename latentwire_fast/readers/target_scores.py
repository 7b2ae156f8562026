"""Log-probabilities of given answers: the result of one teacher-forced pass.

Shapes: N answer tokens of all prompts, V vocabulary, D the reader's width, K ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from latentwire_fast.readers.output_head import OutputHead

PASS_LOGITS = 2**26  # of one pass over whole texts: 256 MiB in fp32


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
        stop_ids: the tokens that end an answer. Where an answer ends, what is scored is that it
            does, with whichever of them: decoding stops at each.
    """

    hidden_ND: Tensor
    head: OutputHead
    labels_N: Tensor
    rows_N: Tensor
    step_N: Tensor
    prompts: int
    stop_ids: tuple[int, ...] = ()

    @cached_property
    def logprobs_NV(self) -> Tensor:
        """fp32, of every token of the vocabulary, all at once."""
        return self.head.logits(self.hidden_ND).log_softmax(-1)

    @cached_property
    def gold_N(self) -> Tensor:
        """Log-probabilities of the answer's own tokens, and that it ends behind them;
        differentiable."""
        several = len(self.stop_ids) > 1
        if not several and self.head.gaps is None:
            return -self.head.losses(self.hidden_ND, self.labels_N, reduction="none").cross_entropy
        labels_N = self.labels_N.to(self.head.weight.device)

        def gold(logprobs_nV: Tensor, labels_n: Tensor) -> Tensor:
            gold_n = logprobs_nV.gather(1, labels_n[:, None])[:, 0]
            if not several:
                return gold_n
            end_n = logprobs_nV[:, [*self.stop_ids]].logsumexp(-1)
            return torch.where(self._stops(labels_n), end_n, gold_n)

        chunks = self.head.chunks(self.hidden_ND, labels_N)
        return torch.cat([gold(self.head.logits(h).log_softmax(-1), y) for h, y in chunks])

    def ranked_NK(self, count: int) -> Tensor:
        """Ids of the `count` most probable tokens, best first; the first of `stop_ids` for all of
        them."""
        count = min(count, self.head.vocabulary)
        with torch.no_grad():
            chunks = self.head.chunks(self.hidden_ND)
            ids_NK = torch.cat([self.head.logits(h).topk(count, -1).indices for (h,) in chunks])
        if len(self.stop_ids) < 2:
            return ids_NK
        return torch.where(self._stops(ids_NK), self.stop_ids[0], ids_NK)

    def _stops(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.stop_ids, device=ids.device))

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
