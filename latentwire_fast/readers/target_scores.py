"""Log-probabilities of given answers: the result of one teacher-forced pass.

Shapes: N answer tokens of all prompts, V vocabulary, K ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetScores:
    """Log-probabilities at the positions that predict the prompts' answers and their EOS.

    Attributes:
        logprobs_NV: fp32, of every token of the vocabulary.
        labels_N: the answer's own tokens.
        rows_N: index of the prompt that each belongs to, ascending.
        step_N: index of the token within its answer; with several turns each begins at 0.
        prompts: how many prompts there were.
        stop_ids: the tokens that end an answer. Where an answer ends, what is scored is that it
            does, with whichever of them: decoding stops at each.
    """

    logprobs_NV: Tensor
    labels_N: Tensor
    rows_N: Tensor
    step_N: Tensor
    prompts: int
    stop_ids: tuple[int, ...] = ()

    @property
    def gold_N(self) -> Tensor:
        """Log-probabilities of the answer's own tokens, and that it ends behind them."""
        labels_N = self.labels_N.to(self.logprobs_NV.device)
        gold_N = self.logprobs_NV.gather(1, labels_N[:, None])[:, 0]
        if len(self.stop_ids) < 2:
            return gold_N
        end_N = self.logprobs_NV[:, [*self.stop_ids]].logsumexp(-1)
        return torch.where(self._stops(labels_N), end_N, gold_N)

    def ranked_NK(self, count: int) -> Tensor:
        """Ids of the `count` most probable tokens, best first; the first of `stop_ids` for all of
        them."""
        ids_NK = self.logprobs_NV.topk(min(count, self.logprobs_NV.shape[1]), -1).indices
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
