"""Cross-entropy of one label per row of logits, with the logits' gradient.

With s the (capped) logits, L the label, e the smoothing and n the tokens there are (logits above
-inf):

    loss = log sum e^s - (1 - e) s_L - e/n sum s
    d loss / d s = softmax(s) - (1 - e) [L] - e/n

One online pass sums e^s, each thread relative to a running maximum of its own (`logit_rows`). The
maximum is subtracted before anything is multiplied: what is left of a sure reader's loss is the
difference of two large logits. The same pass counts the tokens that come before the label when they
are ranked, so that an accuracy costs no further one. The gradient is made in the same launch by a
second walk, backwards: what the first read last is still in L2.

The logits may come as the distillation KL takes them, the teacher's and the student's difference to
it: they are added as they are read. The KL has a launch of its own (`distillation`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from latentwire_fast.kernels.activations import tanh
from latentwire_fast.kernels.logit_rows import (
    LOG2E,
    LOWEST,
    NUM_WARPS,
    STAGES,
    clear_row,
    exp2,
    raised,
    thread_maxima,
    thread_sums,
    tile_offsets,
    tile_shape,
)


@triton.jit
def _student(
    teacher_ptr, other_ptr, offsets, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The student's logits, -inf past the vocabulary, and the cap's slope (1 without one)."""
    inside = offsets < VOCABULARY
    s = tl.load(other_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    if STACKED:
        s = tl.load(teacher_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + s
    slope = 1.0
    if SOFTCAP:
        bent = tanh(s / cap)
        slope = 1.0 - bent * bent
        s = tl.where(inside, cap * bent, float("-inf"))
    return s, slope


@triton.jit
def _statistics(
    t_row, o_row, label, smoothing, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(the row's maximum; log2 sum e^(s - maximum); loss; whether the label is the most probable
    token; smoothing / n)."""
    BLOCK: tl.constexpr = VECTORS * THREADS * LANES
    gold, _gold_slope = _student(t_row, o_row, label, cap, VOCABULARY, STACKED, SOFTCAP)
    gold = tl.where(label < VOCABULARY, gold, float("nan"))
    lanes = tile_offsets(VECTORS, THREADS, LANES)
    top = tl.full((THREADS,), LOWEST, tl.float32)
    z = tl.zeros((THREADS,), tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    tokens = tl.zeros((THREADS,), tl.float32)
    before = tl.zeros((THREADS,), tl.int32)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
        offsets = start + lanes
        s, _slope = _student(t_row, o_row, offsets, cap, VOCABULARY, STACKED, SOFTCAP)
        top, shrink = raised(top, thread_maxima(s), LOG2E)
        z = z * shrink + thread_sums(exp2((s - top[None, :, None]) * LOG2E))
        earlier = (s > gold) | ((s == gold) & (offsets < label))
        before += thread_sums(earlier.to(tl.int32))
        if SMOOTH:
            total += thread_sums(tl.where(s == float("-inf"), 0.0, s))
            tokens += thread_sums(tl.where(s == float("-inf"), 0.0, 1.0))
    highest = tl.max(top, 0)
    log_z = tl.log2(tl.sum(z * exp2((top - highest) * LOG2E), 0))
    loss = log_z / LOG2E + (highest - gold)
    share = 0.0
    if SMOOTH:
        count = tl.sum(tokens, 0)
        share = smoothing / count
        even = log_z / LOG2E + (highest - tl.sum(total, 0) / count)
        loss = (1.0 - smoothing) * loss + smoothing * even
    first = (tl.max(before, 0) == 0) & (loss == loss)
    return highest, log_z, loss, first, share


@triton.jit
def _cross_entropy_kernel(
    teacher_ptr, other_ptr, labels_ptr, loss_ptr, correct_ptr, grad_ptr,
    teacher_stride, other_stride, grad_stride, unit, smoothing, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A row's loss, whether its label is the most probable token, and its gradient times `unit`."""
    BLOCK: tl.constexpr = VECTORS * THREADS * LANES
    LAST: tl.constexpr = (VOCABULARY - 1) // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    t_row, o_row = teacher_ptr + row * teacher_stride, other_ptr + row * other_stride
    grad_row = grad_ptr + row * grad_stride
    label = tl.load(labels_ptr + row).to(tl.int32)
    if label >= 0:
        top, log_z, loss, first, share = _statistics(
            *(t_row, o_row, label, smoothing, cap, VOCABULARY, STACKED, SOFTCAP, SMOOTH),
            *(VECTORS, THREADS, LANES),
        )
        tl.store(loss_ptr + row, loss)
        tl.store(correct_ptr + row, first.to(tl.float32))
        if GRADIENT:
            lanes = tile_offsets(VECTORS, THREADS, LANES)
            for done in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
                offsets = LAST - done + lanes
                s, slope = _student(t_row, o_row, offsets, cap, VOCABULARY, STACKED, SOFTCAP)
                grad = exp2((s - top) * LOG2E - log_z)
                if SMOOTH:
                    grad -= tl.where(s == float("-inf"), 0.0, share)
                grad = tl.where(offsets == label, grad - (1.0 - smoothing), grad) * slope * unit
                grad = grad.to(grad_ptr.dtype.element_ty)
                tl.store(grad_row + offsets, grad, mask=offsets < VOCABULARY)
    else:
        tl.store(loss_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0.0)
        if GRADIENT:
            clear_row(grad_row, VOCABULARY, VECTORS, THREADS, LANES)


def row_cross_entropies(
    teacher: Tensor | None,
    other: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    grad: Tensor | None,
    *,
    unit: float,
    smoothing: float,
    softcap: float = 0.0,
) -> None:
    """Fill losses and correct `[N]` and, if given, grad `[N, V]`, times `unit`: one launch.

    Args:
        other: the student's logits `[N, V]`, or their difference to `teacher` `[N, V]`.
        labels: `[N]` int64; a row whose label is below 0 does not count.
    """
    rows, vocabulary = other.shape
    if not rows:
        return
    base = other if teacher is None else teacher
    _cross_entropy_kernel[(rows,)](
        *(base, other, labels, losses, correct, losses if grad is None else grad),
        *(base.stride(0), other.stride(0), 0 if grad is None else grad.stride(0)),
        *(unit, smoothing, softcap),
        VOCABULARY=vocabulary,
        STACKED=teacher is not None,
        SOFTCAP=softcap > 0,
        SMOOTH=smoothing > 0,
        GRADIENT=grad is not None,
        **tile_shape(base, other),
        num_warps=NUM_WARPS,
    )
