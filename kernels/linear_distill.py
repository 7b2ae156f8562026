"""Distillation KL on hidden states, chunk by chunk: matmul, statistics and gradient, matmul back.

With one head for both it stacks [h_t ; h_s - h_t] (the difference in fp32) for one matmul: the bf16
rounding of its result then is relative to the difference of the logits. Traffic of a chunk: the
matmul's write, the statistics' read, the gradient's read and write (in place), the second matmul's
read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentwire_fast.kernels.distill import row_losses
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

    Holds `[2 * chunk_rows, V]` in the head's dtype, whatever N; never synchronises with the host.
    Gradients not needed are empty. `unit` is what q - p is multiplied by while it is stored in the
    head's dtype.
    """
    rows, width = student_hidden.shape
    vocabulary, dtype = weight.shape[0], weight.dtype
    losses = student_hidden.new_empty(rows, dtype=torch.float32)
    d_hidden = losses.new_empty((rows if needs_hidden else 0, width), dtype=torch.float32)
    d_weight = losses.new_zeros((vocabulary if needs_weight else 0, width))
    chunk_rows = max(min(chunk_rows, rows), 1)
    logits = losses.new_empty((2, chunk_rows, vocabulary), dtype=dtype)
    stored = losses.new_full((), unit / tau)
    mask = None if mask is None else mask.contiguous()
    shared = teacher_weight is None
    head = weight if teacher_weight is None else teacher_weight[:vocabulary].to(dtype)
    for start in range(0, rows, chunk_rows):
        part = slice(start, start + chunk_rows)
        hidden, teacher = student_hidden[part], teacher_hidden[part]
        counts = None if mask is None else mask[part]
        count = hidden.shape[0]
        # Both halves of a short last chunk lie together, as one output of the one matmul.
        both = logits.view(-1, vocabulary)[: 2 * count]
        t, other = both[:count], both[count:]
        if shared:
            difference = (hidden.float() - teacher.float()).to(dtype)
            torch.mm(torch.cat((teacher.to(dtype), difference)), weight.T, out=both)
        else:
            torch.mm(teacher.to(dtype), head.T, out=t)
            torch.mm(hidden.to(dtype), weight.T, out=other)
        grad = other if needs_hidden or needs_weight else None
        row_losses(
            *(t, other, counts, stored, losses[part], grad),
            tau=tau,
            stacked=shared,
            softcap=softcap,
        )
        if needs_hidden:
            torch.mul(matmul_fp32(other, weight), tau / unit, out=d_hidden[part])
        if needs_weight:
            if counts is not None:  # a masked row may hold NaN, which 0 does not cancel
                hidden = torch.where(counts[:, None], hidden, 0.0)
            d_weight.add_(matmul_fp32(other.T, hidden.to(dtype)), alpha=tau / unit)
    return losses, d_hidden, d_weight
