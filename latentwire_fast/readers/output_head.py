"""A reader's output embedding with what is done to its logits: every number that is made of logits
here is made some rows at a time, so that `[N, V]` is never held.

Shapes: N scored tokens, D the reader's width, V rows of the head, K ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.ops.linear_losses import default_chunk_rows
from latentwire_fast.readers.logits import LogitTransform


class Confidence(NamedTuple):
    """What a reader predicts at some places.

    Attributes:
        ids_N: the most probable token.
        margin_N: log-probability of the true token minus that of the likeliest other one; below 0
            where the true one is not the most probable.
        entropy_N: of the probabilities, in nats.
        true_N: log-probability of the true token.
    """

    ids_N: Tensor
    margin_N: Tensor
    entropy_N: Tensor
    true_N: Tensor


@dataclass(frozen=True)
class OutputHead:
    """Hidden states to logits `softcap * tanh(scale * (weight @ h + bias) / softcap)`.

    Attributes:
        weight: `[V, D]`; bias: `[V]`, or None.
        vocabulary: how many of its rows are tokens, the first. The others have probability 0.
        scale, softcap: softcap None: `scale * (weight @ h + bias)`.
        gaps: ids of rows among the first that are no tokens either; `logits` makes them -inf.
            None for none.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    gaps: Tensor | None = None

    @classmethod
    def of_module(
        cls,
        head: nn.Module,
        vocabulary: int,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        gaps: Tensor | None = None,
    ) -> OutputHead:
        """Of a model's output embedding, with the LoRA that it may have."""
        bias = cast(Tensor | None, getattr(head, "bias", None))
        return cls(_effective_weight(head), bias, vocabulary, scale, softcap, gaps)

    def losses(
        self, hidden_ND: Tensor, labels_N: Tensor | None, **options: Any
    ) -> ops.LinearLosses:
        """`ops.linear_cross_entropy_kd` through this head.

        Args:
            options: its `teacher_hidden`, weights of rows, `tau`, gradients and `reduction`.
        """
        device = self.weight.device
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()
        }
        return ops.linear_cross_entropy_kd(
            hidden_ND.to(device),
            None if labels_N is None else labels_N.to(device),
            self.weight,
            bias=self.bias,
            vocabulary=self.vocabulary,
            scale=self.scale,
            softcap=self.softcap,
            **moved,
        )

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits `[N, vocabulary]` in fp32; -inf where a row of the head is no token."""
        weight_VD = self.weight[: self.vocabulary]
        bias_V = None if self.bias is None else self.bias[: self.vocabulary]
        hidden_ND = hidden_ND.to(weight_VD.device, weight_VD.dtype)
        logits_NV = nn.functional.linear(hidden_ND, weight_VD, bias_V).float()
        transform = LogitTransform(self.scale, self.softcap or 0.0)
        return without_gaps(transform(logits_NV), self.gaps)

    @torch.no_grad()
    def confidence(self, hidden_ND: Tensor, labels_N: Tensor) -> Confidence:
        """How sure a reader is of its next tokens, and whether they are the true ones."""
        parts = []
        for hidden_nD, labels_n in self.chunks(hidden_ND, labels_N.to(hidden_ND.device)):
            log_nV = self.logits(hidden_nD).log_softmax(-1)
            labels_n1 = labels_n.to(log_nV.device)[:, None]
            true_n = log_nV.gather(1, labels_n1)[:, 0]
            other_n = log_nV.scatter(1, labels_n1, -torch.inf).amax(-1)
            entropy_n = torch.special.entr(log_nV.exp()).sum(-1)
            parts.append((log_nV.argmax(-1), true_n - other_n, entropy_n, true_n))
        return Confidence(*map(torch.cat, zip(*parts, strict=True)))

    def chunks(self, hidden_ND: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Some rows at a time of the hidden states, and of what belongs to them: so many that their
        logits fit into memory."""
        size = len(hidden_ND), self.vocabulary
        rows = default_chunk_rows(*size, terms=1, distils=False)
        return zip(*(part.split(rows) for part in (hidden_ND, *more)), strict=True)


def without_gaps(logits: Tensor, gaps: Tensor | None) -> Tensor:
    """Logits `[..., vocabulary]` that are minus infinity at ids which stand for nothing: decoding
    and scoring never choose one."""
    return logits if gaps is None else logits.index_fill(-1, gaps.to(logits.device), -torch.inf)


def _effective_weight(head: nn.Module) -> Tensor:
    """The matrix that a head multiplies with: peft keeps a LoRA beside the weight until it is
    merged."""
    weight = cast(Tensor, head.weight)
    delta = getattr(head, "get_delta_weight", None)
    if delta is None or getattr(head, "disable_adapters", False) or getattr(head, "merged", False):
        return weight
    for name in getattr(head, "active_adapters", ()):
        if name in getattr(head, "lora_A", {}):
            weight = weight + delta(name).to(weight)
    return weight
