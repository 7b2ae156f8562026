"""Distillation KL on logits with the student's gradient; `linear_losses` has the head.

Per row, with Delta = (s - t)/tau, p = softmax(t/tau), q = softmax(s/tau), and x = Delta - c for
some centre c:

    KL(p || q) = log E_p[e^x] - E_p[x] = E_p[e^x - 1 - x] + (log1p(B) - B),   B = E_p[e^x] - 1

One online pass accumulates, in each thread (`logit_rows`) relative to its own running maximum m of
t/tau: z = sum w, d = sum w x, g = sum w (e^x - 1 - x), where w = e^(t/tau - m). For |x| < 1 the
last is a polynomial, so nothing cancels; elsewhere w e^x is e^(s/tau), kept apart (f) relative to
the thread's maximum of s/tau, so that a token with p = 0 counts, and nothing overflows. The
textbook one-pass form is off by 4e-2 at KL 5e-5 and can go negative; this is good to 1e-6.

A thread's c follows its mean of Delta, which the first token of a peaked teacher decides: before a
tile is summed, c moves to the mean that includes it, y lower, and the sums so far with it:

    g' = g + (e^y - 1 - y) (z + d + g) + y (d + g),   d' = d + y z

At the end of the row the threads' sums are brought to one maximum and one centre by the same
formula. A move by 30 or more, which e^y could overflow in, is not made; then, and wherever the
means stay far from their centres against the KL, the pass is repeated about the row's mean. Sums
that underflow because a later token is so much more probable are not missed: E_p[e^x] >= 1 about
the mean, by Jensen, and what they held of it was below e^30 2^-126.

    d KL / d s = (q - p) / tau,   q - p = p expm1(r),   r = log(q/p) = Delta - (c + E_p[x]) - KL

again without cancellation: for |r| < 1/2 by a polynomial, else q - p itself. Losses and gradients
carry tau^2. A student logit of -inf removes its token from both distributions.

The gradient is made in the same launch, by a second walk over the row. It goes backwards: what the
first walk read last is still in L2. `scale_rows` then multiplies it by the incoming gradient, and
returns at once where that is 1.
"""

from __future__ import annotations

import torch
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
    reciprocal,
    thread_maxima,
    thread_sums,
    tile_offsets,
    tile_shape,
    widened,
)

SCALED_BLOCK = 2048  # numbers that `scale_rows` takes at a time
# So far a centre moves at once; beyond, e^y would grow too large, and the row is summed once more.
FARTHEST = tl.constexpr(30.0)
# In place of a difference from a token without probability: times 0, it is 0.
FAR_AWAY = tl.constexpr(1e30)


@triton.jit
def _exp_less(x, FAR: tl.constexpr):
    """e^x - 1 - x for |x| < 1 (FAR) or 1/2, by a polynomial of least relative error: 1.6e-7, 9e-8.

    A power series that good has two terms more.
    """
    if FAR:
        y = 2.4980010e-05 * x + 2.0319303e-04
        y = y * x + 1.3890791e-03
        y = y * x + 8.3310166e-03
        y = y * x + 4.1666560e-02
        y = y * x + 1.6666694e-01
    else:
        y = 1.9863382e-04 * x + 1.3975332e-03
        y = y * x + 8.3334800e-03
        y = y * x + 4.1666001e-02
        y = y * x + 1.6666666e-01
    y = y * x + 0.5
    return x * x * y


@triton.jit
def _load(
    t_ptr, other_ptr, offsets, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of teacher and student, their difference, and the cap's slope (1 without one).

    `other` holds the difference if STACKED, else the student. Numbers past the vocabulary, and
    tokens that the student lacks, get t = s = -inf; where t is -inf the difference may be anything.
    """
    inside = offsets < VOCABULARY
    if STACKED:
        t = widened(tl.load(t_ptr + offsets, mask=inside, other=float("-inf")))
        delta = widened(tl.load(other_ptr + offsets, mask=inside, other=0.0))
        s = t + delta
    else:
        t = widened(tl.load(t_ptr + offsets, mask=inside, other=0.0))
        # Masked once widened: a select of bf16 would take the pairs apart first.
        s = widened(tl.load(other_ptr + offsets, mask=inside, other=0.0))
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(s == float("-inf"), s, t)
        delta = s - t
    slope = 1.0
    if SOFTCAP:
        t_bent, s_bent = tanh(t / cap), tanh(s / cap)
        delta = cap * tanh(delta / cap) * (1.0 - t_bent * s_bent)
        slope = 1.0 - s_bent * s_bent
        t = tl.where(inside, cap * t_bent, float("-inf"))
        s = tl.where(inside, cap * s_bent, float("-inf"))
    return t, s, delta, slope


@triton.jit
def _recentred(z, d, g, y):
    """g about a centre that is y lower."""
    bend = tl.where(tl.abs(y) < 1.0, _exp_less(y, True), exp2(y * LOG2E) - 1.0 - y)
    return g + bend * (z + d + g) + y * (d + g)


@triton.jit
def _row_sums(
    t_ptr, other_ptr, scale, cap, start_centre, moves,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each thread's maxima of teacher and student (log2), centre, z, d, g and f, `[THREADS]`.

    moves: 1 if the centres follow the means, 0 if they stay.
    Bounds are `where`s, not minima and maxima: those drop NaN, and a NaN logit must show.
    """
    BLOCK: tl.constexpr = VECTORS * THREADS * LANES
    k = scale * LOG2E
    lanes = tile_offsets(VECTORS, THREADS, LANES)
    t_top = tl.full((THREADS,), LOWEST, tl.float32)
    s_top = tl.full((THREADS,), LOWEST, tl.float32)
    centre = tl.zeros((THREADS,), tl.float32) + start_centre
    z = tl.zeros((THREADS,), tl.float32)
    d = tl.zeros((THREADS,), tl.float32)
    g = tl.zeros((THREADS,), tl.float32)
    f = tl.zeros((THREADS,), tl.float32)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
        t, s, delta, _ = _load(t_ptr, other_ptr, start + lanes, cap, VOCABULARY, STACKED, SOFTCAP)
        empty = t_top == LOWEST
        t_top, shrink = raised(t_top, thread_maxima(t) * k, 1.0)
        s_top, s_shrink = raised(s_top, thread_maxima(s) * k, 1.0)
        w = exp2(t * k - t_top[None, :, None])
        delta = tl.where(w > 0, delta, FAR_AWAY) * scale
        z_old, d_old, g_old = z * shrink, d * shrink, g * shrink
        z = z_old + thread_sums(w)
        d = d_old + thread_sums(w * (delta - centre[None, :, None]))
        # The centre follows the mean before the tile is summed about it.
        y = -moves * d * reciprocal(z + 1e-30)
        near_y = tl.where(tl.abs(y) < FARTHEST, y, 0.0)
        y = tl.where(empty, y, near_y)
        centre -= y
        d += y * z
        x = delta - centre[None, :, None]
        near = tl.abs(x) < 1.0
        new = thread_sums(w * tl.where(near, _exp_less(x, True), -1.0 - x))
        g = _recentred(z_old, d_old, g_old, near_y) + new
        u = exp2(s * k - s_top[None, :, None])
        f = f * s_shrink + thread_sums(tl.where(near, 0.0, u))
    return t_top, s_top, centre, z, d, g, f


@triton.jit
def _row_pass(
    t_ptr, other_ptr, scale, cap, start_centre, moves,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(log2 sum e^(t/tau), E_p[Delta], KL, whether the sums lost something) of a row."""
    t_top, s_top, centre, z, d, g, f = _row_sums(
        *(t_ptr, other_ptr, scale, cap, start_centre, moves),
        *(VOCABULARY, STACKED, SOFTCAP, VECTORS, THREADS, LANES),
    )
    # The threads' sums, relative to the row's maxima and about one centre.
    t_row, s_row = tl.max(t_top, 0), tl.max(s_top, 0)
    share = exp2(t_top - t_row)
    far = tl.sum(f * exp2(s_top - s_row), 0)
    off = tl.where(z > 0, d * d / z, 0.0) * share
    z, d, g = z * share, d * share, g * share
    z_sum = tl.sum(z, 0)
    middle = tl.sum(z * centre, 0) / z_sum
    y = tl.where(t_top == LOWEST, 0.0, centre - middle)
    mean = tl.sum(d + y * z, 0) / z_sum
    astray = tl.abs(y) >= FARTHEST
    excess = tl.sum(_recentred(z, d, g, tl.where(astray, 0.0, y)), 0) / z_sum
    log_z = t_row + tl.log2(z_sum)
    kl = _divergence(excess, mean, far, tl.log2(far) + s_row - log_z, middle)
    lost = (tl.max(astray.to(tl.int32), 0) > 0) | (tl.sum(off, 0) / z_sum > 16.0 * kl)
    return log_z, middle + mean, kl, lost


@triton.jit
def _divergence(excess, mean, far, far_log2, centre):
    """The KL of a row's sums about a centre.

    excess: E_p[e^x - 1 - x] without the far tokens' e^x; far, far_log2: theirs, apart; mean:
    E_p[x].
    """
    # log of what the far tokens add to E_p[e^x]; past 30 nothing else counts.
    far_log = far_log2 / LOG2E - centre
    bounded = tl.where(far_log > 30.0, 30.0, far_log)
    excess += tl.where(far == 0, 0.0, tl.exp(bounded))
    b = excess + mean
    small = tl.abs(b) < 0.5
    b_small = tl.where(small, b, 0.0)
    # log1p(b) - b by its series' closed form: with v = b/(2+b), log1p(b) = 2 atanh(v).
    v = b_small / (2.0 + b_small)
    v2 = v * v
    tail = 1.0 / 7 + v2 * (1.0 / 9 + v2 * (1.0 / 11 + v2 * (1.0 / 13)))
    tail = 1.0 / 3 + v2 * (0.2 + v2 * tail)
    kl_small = excess + (2.0 * v * v2 * tail - v * b_small)
    total = tl.where(1.0 + b < 1e-30, 1e-30, 1.0 + b)
    kl_large = tl.where(far_log > 30.0, far_log, tl.log(total)) - mean
    kl = tl.where(small, kl_small, kl_large)
    return tl.where(kl < 0, 0.0, kl)


@triton.jit
def _row_statistics(
    t_ptr, other_ptr, scale, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(log2 sum e^(t/tau), E_p[Delta], KL)."""
    log_z = 0.0
    kl = 0.0
    mean = 0.0
    tries = 2
    while tries > 0:
        log_z, mean, kl, lost = _row_pass(
            *(t_ptr, other_ptr, scale, cap, mean, tl.where(tries == 2, 1.0, 0.0)),
            *(VOCABULARY, STACKED, SOFTCAP, VECTORS, THREADS, LANES),
        )
        tries = tl.where(lost, tries - 1, 0)
    return log_z, mean, kl


@triton.jit
def _gradient(t, s, delta, scale, log_z, shift):
    """q - p, where log(q/p) = Delta - shift."""
    k = scale * LOG2E
    p = exp2(t * k - log_z)
    q = exp2(s * k - (log_z + shift * LOG2E))
    r = delta * scale - shift
    near = (tl.abs(r) < 0.5) & (p > 0)
    return tl.where(near, p * (r + _exp_less(r, False)), q - p)


@triton.jit
def _kl_kernel(
    teacher_ptr, other_ptr, mask_ptr, weight_ptr, loss_ptr, grad_ptr,
    teacher_stride, other_stride, grad_stride, tau, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A row's loss, and its gradient times the one weight; `grad` may be `other`."""
    BLOCK: tl.constexpr = VECTORS * THREADS * LANES
    LAST: tl.constexpr = (VOCABULARY - 1) // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    t_row, o_row = teacher_ptr + row * teacher_stride, other_ptr + row * other_stride
    grad_row = grad_ptr + row * grad_stride
    counts = True
    if MASKED:
        counts = tl.load(mask_ptr + row) != 0
    if counts:
        scale = 1.0 / tau
        log_z, mean, kl = _row_statistics(
            *(t_row, o_row, scale, cap),
            *(VOCABULARY, STACKED, SOFTCAP, VECTORS, THREADS, LANES),
        )
        tl.store(loss_ptr + row, kl * tau * tau)
        if GRADIENT:
            lanes = tile_offsets(VECTORS, THREADS, LANES)
            factor = tl.load(weight_ptr).to(tl.float32) * tau
            for done in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
                offsets = LAST - done + lanes
                t, s, delta, slope = _load(t_row, o_row, offsets, cap, VOCABULARY, STACKED, SOFTCAP)
                grad = _gradient(t, s, delta, scale, log_z, mean + kl) * slope * factor
                grad = grad.to(grad_ptr.dtype.element_ty)
                tl.store(grad_row + offsets, grad, mask=offsets < VOCABULARY)
    else:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            clear_row(grad_row, VOCABULARY, VECTORS, THREADS, LANES)


@triton.jit
def _scale_rows_kernel(
    x_ptr, factors_ptr, x_stride, factor_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors_ptr + row * factor_stride).to(tl.float32)
    if factor != 1.0:
        for start in range(0, WIDTH, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            place = x_ptr + row * x_stride + offsets
            x = tl.load(place, mask=offsets < WIDTH, other=0.0).to(tl.float32)
            x = tl.where(factor == 0.0, 0.0, x * factor)
            tl.store(place, x.to(x_ptr.dtype.element_ty), mask=offsets < WIDTH)


def _unit_rows(x: Tensor) -> Tensor:
    """Rows may lie apart; a row's numbers may not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_losses(
    teacher: Tensor,
    other: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    losses: Tensor,
    grad: Tensor | None,
    *,
    tau: float,
    stacked: bool = False,
    softcap: float = 0.0,
) -> None:
    """Fill losses `[N]` and, if given, grad `[N, V]`: one launch."""
    rows, vocabulary = other.shape
    if not rows:
        return
    absent = losses
    _kl_kernel[(rows,)](
        *(teacher, other, absent if mask is None else mask, absent if weight is None else weight),
        *(losses, absent if grad is None else grad, teacher.stride(0), other.stride(0)),
        *(0 if grad is None else grad.stride(0), tau, softcap),
        VOCABULARY=vocabulary,
        STACKED=stacked,
        SOFTCAP=softcap > 0,
        MASKED=mask is not None,
        GRADIENT=grad is not None,
        **tile_shape(teacher, other),
        num_warps=NUM_WARPS,
    )


def kd_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """Losses `[N]` in fp32 of logits `[N, V]`, 0 where masked: one launch.

    `grad` `[N, V]`, whose rows hold their numbers side by side, takes `weight` (0-dim) times each
    loss's gradient; it may be `student`.
    """
    losses = student.new_empty(student.shape[0], dtype=torch.float32)
    mask = None if mask is None else mask.contiguous()
    row_losses(_unit_rows(teacher), _unit_rows(student), mask, weight, losses, grad, tau=tau)
    return losses


def scale_rows(x: Tensor, factors: Tensor) -> None:
    """x `[N, V]` times `factors` (0-dim, or `[N]`) in place; 0 where the factor is 0.

    One launch, which moves nothing where the factor is 1.
    """
    rows, width = x.shape
    if x.numel():
        _scale_rows_kernel[(rows,)](
            *(x, factors, x.stride(0), factors.stride(0) if factors.dim() else 0),
            WIDTH=width,
            BLOCK=SCALED_BLOCK,
            num_warps=NUM_WARPS,
        )
