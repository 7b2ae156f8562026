"""Distillation KL on hidden states, chunk by chunk: matmul, statistics and gradient, matmul back.

The logits are fp32 for half precision inputs too: in bf16 they would put the loss off by 1 % and,
at a KL of 5e-5, its gradient by twice its size. With one head for both the rows [h_t ; h_s - h_t]
are multiplied: to subtract logits instead costs a small difference three digits.

For its matmul the difference, taken in fp32, is rounded to the head's dtype. What that loses, r, is
1e-3 of the loss, and is put back to first order: loss += <dKL/dh_s, r>. The hidden gradient comes
from the matmul back, so that this takes no other (and a call without gradient makes that one); the
second order is 3e-6. The gradient is left 2e-3 off.

Traffic of a chunk, bytes per pair of logits: the matmul writes 8, the statistics read 8, the
gradient reads 8 and writes 2, the matmul back reads 2 (4 and 4 with fp32 heads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentwire_fast.kernels.distillation import row_losses
from latentwire_fast.kernels.matmul import matmul_fp32


def linear_kd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    mask: Tensor | None,
    *,
    tau: float,
    softcap: float,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[N]`, their gradients for `student_hidden` `[N, d]`, their sum's for `weight` `[V,
    d]`, in fp32.

    Holds `[2 * chunk_rows, V]` in fp32, and with half precision heads `[chunk_rows, V]` in their
    dtype besides, whatever N; never synchronises with the host.

    Args:
        weight: `[V, d]`; teacher_weight: `[V_t, d_t]`, V_t >= V; both in one dtype, which the
        hidden states fit into.
        unit: what q - p is multiplied by while it is stored in the heads' dtype.

    Returns:
        Empty gradients where not needed.
    """
    rows, width = student_hidden.shape
    vocabulary, dtype = weight.shape[0], weight.dtype
    half, shared = dtype != torch.float32, teacher_weight is None
    losses = student_hidden.new_empty(rows, dtype=torch.float32)
    d_hidden = losses.new_empty((rows if needs_hidden else 0, width), dtype=torch.float32)
    d_weight = losses.new_zeros((vocabulary if needs_weight else 0, width))
    chunk_rows = max(min(chunk_rows, rows), 1)
    logits = losses.new_empty((2 * chunk_rows, vocabulary), dtype=torch.float32)
    needs_back = needs_hidden or (half and shared)
    needs_gradient = needs_back or needs_weight
    gradients = logits  # fp32 ones take their logits' place
    if half and needs_gradient:
        gradients = losses.new_empty((chunk_rows, vocabulary), dtype=dtype)
    stored = losses.new_full((), unit / tau)
    mask = None if mask is None else mask.contiguous()
    for start in range(0, rows, chunk_rows):
        part = slice(start, start + chunk_rows)
        counts = None if mask is None else mask[part]
        hidden, teacher = (_counted(x[part], counts) for x in (student_hidden, teacher_hidden))
        both = logits[: 2 * len(hidden)]
        t, other = both.chunk(2)
        lost = _multiply(hidden, teacher, weight, teacher_weight, both)
        grad = gradients[: len(hidden)] if half else other
        row_losses(
            *(t, other, counts, stored, losses[part], grad if needs_gradient else None),
            tau=tau,
            stacked=shared,
            softcap=softcap,
        )
        if needs_back:
            back = matmul_fp32(grad, weight, out=d_hidden[part] if needs_hidden else None)
            back *= tau / unit
            if lost is not None:
                losses[part] += (back * lost).sum(1)
        if needs_weight:
            d_weight.add_(matmul_fp32(grad.T, hidden.to(dtype)), alpha=tau / unit)
    return losses.clamp_(min=0), d_hidden, d_weight


def _counted(hidden: Tensor, counts: Tensor | None) -> Tensor:
    """Zeros for the rows that are masked: those may hold NaN, and 0 times that is NaN."""
    return hidden if counts is None else torch.where(counts[:, None], hidden, 0.0)


def _multiply(
    hidden: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor | None, out: Tensor
) -> Tensor | None:
    """Fill the teacher's logits and below them the student's, or with one head their difference.

    Returns what the difference of the hidden states lost by rounding, if it was rounded.
    """
    dtype = weight.dtype
    if teacher_weight is None:
        difference = hidden.float() - teacher
        rounded = difference.to(dtype)
        matmul_fp32(torch.cat((teacher.to(dtype), rounded)), weight.T, out=out)
        return None if dtype == torch.float32 else difference - rounded
    t, s = out.chunk(2)
    matmul_fp32(teacher.to(dtype), teacher_weight[: len(weight)].T, out=t)
    matmul_fp32(hidden.to(dtype), weight.T, out=s)
    return None
