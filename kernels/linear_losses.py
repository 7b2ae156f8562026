"""Cross-entropy and distillation KL on hidden states, chunk by chunk: matmul, statistics and
gradients, matmul back.

The logits are fp32 for half precision inputs too: in bf16 they would put the KL off by 1 % and,
at a KL of 5e-5, its gradient by twice its size. With one head for both the rows [h_t ; h_s - h_t]
are multiplied: to subtract logits instead costs a small difference three digits. A bias is in both
logits and cancels in the difference.

For its matmul the difference, taken in fp32, is rounded to the head's dtype. What that loses, r, is
1e-3 of the KL, and is put back to first order: loss += <dKL/dh_s, r>. The hidden gradient comes
from the matmul back, so that this takes no other (and a call without gradient makes that one); the
second order is 3e-6. The gradient is left 2e-3 off. The cross-entropy gets the same if it is
trained; otherwise it is a number for a report, and stays off by what a logit is, 2e-3 of the
difference.

Each term has its own gradient: whoever adds the losses up may weigh them as he likes, afterwards.

Traffic of a chunk with the KL, bytes per pair of logits: the matmul writes 8, the statistics read
8, the gradient reads 8 and writes 2, the matmul back reads 2 (4 and 4 with fp32 heads). The
cross-entropy as a second term reads 16, writes 2 and reads 2 more; alone it halves the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.kernels.cross_entropy import row_cross_entropies
from latentwire_fast.kernels.distillation import row_losses
from latentwire_fast.kernels.matmul import add_matmul_fp32, matmul_fp32

ALIGNED = 16  # tokens of a row that 16-byte accesses reach


def linear_losses(
    rows: Any, heads: Any, settings: Any, factors: tuple[Tensor, Tensor], *, unit: float
) -> list[Tensor]:
    """The results of `reference.linear_losses`, which has the formulas, in fp32.

    Holds `[2 * chunk_rows, V]` in fp32 (`[chunk_rows, V]` without a teacher), and for each trained
    term `[chunk_rows, V]` in the heads' dtype besides (with fp32 heads for the cross-entropy alone,
    and with a teacher alone), whatever N; never synchronises with the host.

    Args:
        rows, heads, settings: as in the reference. The heads are of one dtype, which their products
        are computed in.
        factors: of `reference.row_factors`.
        unit: what q - p is multiplied by while it is stored in the heads' dtype.
    """
    (count, width), vocabulary = rows.hidden.shape, heads.weight.shape[0]
    terms = settings.label_gradient + settings.kd_gradient
    results = [
        rows.hidden.new_empty(shape, dtype=torch.float32)
        for shape in (
            *[(count,)] * 3,
            (terms, count if settings.needs_hidden else 0, width),
            (terms, vocabulary if settings.needs_weight else 0, width),
            (terms, vocabulary if settings.needs_bias else 0),
        )
    ]
    for place in (*(() if rows.labels is not None else (0, 2)), 4, 5):
        results[place].zero_()
    if rows.teacher_hidden is None:
        results[1].zero_()
    chunk = max(min(settings.chunk_rows, count), 1)
    work = _Workspace(rows, heads, settings, chunk)
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        _chunk(part, rows, work, [factor[part] for factor in factors], results, unit)
    results[1].clamp_(min=0)
    for losses, factor in zip(results[:2], factors, strict=True):
        losses.copy_(torch.where(factor != 0, losses * factor, 0.0))
    return results


class _Workspace:
    """Buffers for a chunk's logits and gradients, and the heads' rows that are multiplied.

    Rows past the vocabulary, up to a multiple of 16, are multiplied too and then set to -inf: so
    each row of logits begins and ends where 16-byte accesses do. A softcap would make a number of
    -inf; then an odd vocabulary is left odd.
    """

    def __init__(self, rows: Any, heads: Any, settings: Any, chunk: int) -> None:
        self.settings, self.known = settings, settings.vocabulary
        self.shared = heads.teacher_weight is None
        self.distils = rows.teacher_hidden is not None
        there = [len(w) for w in (heads.weight, heads.teacher_weight) if w is not None]
        aligned = -(-self.known // ALIGNED) * ALIGNED
        width = aligned if aligned <= min(there) and not settings.softcap else self.known
        self.weight, self.bias = heads.weight[:width], _cut(heads.bias, width)
        self.teacher_weight, self.teacher_bias = self.weight, self.bias
        if not self.shared:
            self.teacher_weight = heads.teacher_weight[:width]
            self.teacher_bias = _cut(heads.teacher_bias, width)
        self.dtype = heads.weight.dtype
        self.half = self.dtype != torch.float32
        # The KL's gradient also gives back what rounding took from its loss.
        makes_kd = self.distils and (settings.kd_gradient or (self.half and self.shared))
        makes_labels = rows.labels is not None and settings.label_gradient
        size = (chunk * (1 + self.distils), width)
        self.logits = rows.hidden.new_empty(size, dtype=torch.float32)
        self.makes = (makes_labels, makes_kd)
        # fp32 gradients take their logits' place, once no other term reads these.
        apart = (makes_labels and (self.half or self.distils), makes_kd and self.half)
        self.apart = [
            self.logits.new_empty((chunk, width), dtype=self.dtype) if own else None
            for own in apart
        ]

    def gradient(self, place: int, rows: int, logits: Tensor) -> Tensor | None:
        """Where a term's gradients of some rows go; None if none are made."""
        buffer = self.apart[place]
        if buffer is not None:
            return buffer[:rows]
        return logits if self.makes[place] else None

    def multiply(
        self, hidden: Tensor, teacher: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(the teacher's logits; the student's, or with one head their difference; what the
        difference of the hidden states lost by rounding, if it was rounded)."""
        both = self.logits[: len(hidden) * (1 + self.distils)]
        if teacher is None:
            matmul_fp32(hidden.to(self.dtype), self.weight.T, out=both)
            return None, self._finished(both, self.bias), None
        t, other = both.chunk(2)
        if not self.shared:
            matmul_fp32(teacher.to(self.dtype), self.teacher_weight.T, out=t)
            matmul_fp32(hidden.to(self.dtype), self.weight.T, out=other)
            return self._finished(t, self.teacher_bias), self._finished(other, self.bias), None
        difference = hidden.float() - teacher
        rounded = difference.to(self.dtype)
        matmul_fp32(torch.cat((teacher.to(self.dtype), rounded)), self.weight.T, out=both)
        if self.settings.scale != 1.0:
            other *= self.settings.scale
        return self._finished(t, self.bias), other, difference - rounded if self.half else None

    def _finished(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            logits += bias
        if self.settings.scale != 1.0:
            logits *= self.settings.scale
        if logits.shape[1] > self.known:
            logits[:, self.known :] = -torch.inf
        return logits


def _cut(bias: Tensor | None, width: int) -> Tensor | None:
    return None if bias is None else bias[:width]


def _chunk(
    part: slice,
    rows: Any,
    work: _Workspace,
    factors: list[Tensor],
    results: list[Tensor],
    unit: float,
) -> None:
    """Fill in the results of the rows of a part; losses are not weighted yet."""
    settings = work.settings
    labelled, taught = (factor != 0 for factor in factors)
    # Zeros for the rows that do not count: those may hold NaN, and 0 times that is NaN.
    hidden = torch.where((labelled | taught)[:, None], rows.hidden[part], 0.0)
    teacher = None
    if work.distils:
        instead = hidden.to(rows.teacher_hidden.dtype) if work.shared else 0.0
        teacher = torch.where(taught[:, None], rows.teacher_hidden[part], instead)
    t, other, lost = work.multiply(hidden, teacher)
    label_grad, kd_grad = (work.gradient(place, len(hidden), other) for place in range(2))
    label_losses, kd_losses, correct = (x[part] for x in results[:3])
    if rows.labels is not None:
        row_cross_entropies(
            *(t if work.shared else None, other, torch.where(labelled, rows.labels[part], -1)),
            *(label_losses, correct, label_grad),
            unit=unit,
            smoothing=settings.smoothing,
            softcap=settings.softcap,
        )
    if t is not None:
        stored = kd_losses.new_full((), unit / settings.tau)
        row_losses(
            *(t, other, taught, stored, kd_losses, kd_grad),
            tau=settings.tau,
            stacked=work.shared,
            softcap=settings.softcap,
        )
    for place, (grad, by) in enumerate(((label_grad, 1.0), (kd_grad, settings.tau))):
        if grad is not None:
            losses = label_losses if place == 0 else kd_losses
            back = _Back(grad, settings.scale * by / unit, losses, factors[place])
            _go_back(back, place, part, hidden, lost, work, results)


@dataclass
class _Back:
    """What goes back from a term: its gradient as it is stored, `by` what it becomes the true one,
    its losses and the rows' factors."""

    grad: Tensor
    by: float
    losses: Tensor
    factors: Tensor


def _go_back(
    back: _Back,
    place: int,
    part: slice,
    hidden: Tensor,
    lost: Tensor | None,
    work: _Workspace,
    results: list[Tensor],
) -> None:
    """Through the head, to the hidden states and to the head itself."""
    settings, (_, width) = work.settings, back.grad.shape
    trained = settings.kd_gradient if place else settings.label_gradient
    term = place if settings.label_gradient else 0
    if (trained and settings.needs_hidden) or lost is not None:
        through = matmul_fp32(back.grad, work.weight).mul_(back.by)
        if lost is not None:
            back.losses += (through * lost).sum(1)
        if trained and settings.needs_hidden:
            factors = back.factors[:, None]
            results[3][term, part] = torch.where(factors != 0, through * factors, 0.0)
    if not trained:
        return
    if settings.needs_weight:
        counted = (hidden * back.factors[:, None]).to(work.dtype)
        add_matmul_fp32(results[4][term, :width], back.grad.T, counted, by=back.by)
    if settings.needs_bias:
        results[5][term, :width] += (back.grad.float().T @ back.factors) * back.by
