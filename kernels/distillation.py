"""Distillation KL on logits with the student's gradient; `linear_losses` has the head.

Per row, with Delta = (s - t)/tau, p = softmax(t/tau), q = softmax(s/tau), and x = Delta - c for
some centre c:

    KL(p || q) = log E_p[e^x] - E_p[x] = E_p[e^x - 1 - x] + (log1p(B) - B),   B = E_p[e^x] - 1

One online pass accumulates, relative to the running maximum m of t/tau and per lane: z = sum w,
d = sum w x, g = sum w (e^x - 1 - x), where w = e^(t/tau - m). For |x| < 1 the last is a power
series, so nothing cancels; elsewhere w e^x is e^(s/tau), kept apart (f) relative to the running
maximum of s/tau, so that a token with p = 0 counts, and nothing overflows. The textbook one-pass
form is off by 4e-2 at KL 5e-5 and can go negative; this is good to 1e-6.

A tile that more than doubles e^m, or the student's (few do), rescales the sums and moves c to the
mean of Delta so far, which the first token of a peaked teacher decides. With y = c - c':

    g' = g + (e^y - 1 - y) (z + d + g) + y (d + g),   d' = d + y z

Should E_p[x] still turn out large against the KL, the pass is repeated about the mean. So it is
where the teacher's maximum rose by more than 100 bits: the sums of the first tiles underflow, and
with them what the student had there near the centre. About the mean that is nothing: E_p[e^x] >= 1
by Jensen, to which a token of p < 2^-100 adds less than e p where |x| < 1; elsewhere f has it.

    d KL / d s = (q - p) / tau,   q - p = p expm1(r),   r = log(q/p) = Delta - (c + E_p[x]) - KL

again without cancellation: for |r| < 1/2 by a power series, else q - p itself. Losses and gradients
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

# A row is a program: 63 tiles at a vocabulary of 128k. 8 elements per thread keep it at about 115
# registers, two programs per SM; 4 warps would need 168 to 250, and spill. Two tiles are on their
# way while one is summed: of bf16 32 KB per SM, about bandwidth times latency.
BLOCK = 2048
NUM_WARPS = 8
STAGES = tl.constexpr(3)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp_less(x, FAR: tl.constexpr):
    """e^x - 1 - x by its series, to fp32's precision for |x| < 1 (FAR) or 1/2."""
    y = 1.0 / 362880
    if FAR:
        y = x * (1.0 / 3628800) + y
    y = y * x + 1.0 / 40320
    y = y * x + 1.0 / 5040
    y = y * x + 1.0 / 720
    y = y * x + 1.0 / 120
    y = y * x + 1.0 / 24
    y = y * x + 1.0 / 6
    y = y * x + 0.5
    return x * x * y


@triton.jit
def _load(
    t_ptr, other_ptr, offsets, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of teacher and student, their difference, and the cap's slope (1 without one).

    `other` holds the difference if STACKED, else the student. Lanes past the vocabulary, and tokens
    that the student lacks, get t = s = -inf; where t is -inf the difference may be anything.
    """
    inside = offsets < VOCABULARY
    if STACKED:
        t = tl.load(t_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        delta = tl.load(other_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        s = t + delta
    else:
        t = tl.load(t_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(other_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
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
def _finite(x):
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _row_pass(
    t_ptr, other_ptr, scale, cap, centre, moves,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(log2 sum e^(t/tau), centre, E_p[x], KL, rise) about `centre`, which is bettered if `moves`.

    rise: that of log2 of the teacher's running maximum since the first tile.
    Bounds are `where`s, not minima and maxima: those drop NaN, and a NaN logit must show.
    """
    k = scale * LOG2E
    lanes = tl.arange(0, BLOCK)
    t_first = float("-inf")
    t_top = float("-inf")
    s_top = float("-inf")
    z = tl.zeros((BLOCK,), tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    g = tl.zeros((BLOCK,), tl.float32)
    f = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
        t, s, delta, _ = _load(t_ptr, other_ptr, start + lanes, cap, VOCABULARY, STACKED, SOFTCAP)
        w_log, u_log = t * k - _finite(t_top), s * k - _finite(s_top)
        rise = tl.max(tl.maximum(w_log, u_log), 0)
        if (rise > 1.0) | (t_top == float("-inf")) | (s_top == float("-inf")):
            t_new = tl.maximum(t_top, tl.max(t, 0) * k)
            s_new = tl.maximum(s_top, tl.max(s, 0) * k)
            shrink = tl.exp2(t_top - _finite(t_new))
            f *= tl.exp2(s_top - _finite(s_new))
            t_first = tl.where(t_top == float("-inf"), t_new, t_first)
            t_top, s_top = t_new, s_new
            w_log, u_log = t * k - _finite(t_top), s * k - _finite(s_top)
            w = tl.exp2(w_log)
            x = tl.where(w > 0, delta * scale - centre, 0.0)
            z_old = tl.sum(z, 0) * shrink
            z_new = z_old + tl.sum(w, 0)
            y = -(tl.sum(d, 0) * shrink + tl.sum(w * x, 0)) / z_new
            # Past 20 the sums so far could overflow.
            y = tl.where(moves & (z_new > 0) & ((z_old == 0) | (tl.abs(y) < 20.0)), y, 0.0)
            centre -= y
            y = tl.where(z_old == 0, 0.0, y)
            bend = tl.where(tl.abs(y) < 1.0, _exp_less(y, True), tl.exp(y) - 1.0 - y)
            g = (g + bend * (z + d + g) + y * (d + g)) * shrink
            d = (d + y * z) * shrink
            z *= shrink
        w, u = tl.exp2(w_log), tl.exp2(u_log)
        x = tl.where(w > 0, delta * scale - centre, 0.0)
        near = (tl.abs(x) < 1.0) & (w > 0)
        z += w
        d += w * x
        g += w * tl.where(near, _exp_less(x, True), -1.0 - x)
        f += tl.where(near, 0.0, u)
    z_sum, far = tl.sum(z, 0), tl.sum(f, 0)
    log_z = _finite(t_top) + tl.log2(z_sum)
    mean = tl.sum(d, 0) / z_sum
    # log of what the far tokens add to E_p[e^x]; past 30 nothing else counts.
    far_log = (tl.log2(far) + _finite(s_top) - log_z) / LOG2E - centre
    bounded = tl.where(far_log > 30.0, 30.0, far_log)
    excess = tl.sum(g, 0) / z_sum + tl.where(far == 0, 0.0, tl.exp(bounded))
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
    return log_z, centre, mean, tl.where(kl < 0, 0.0, kl), t_top - t_first


@triton.jit
def _row_statistics(
    t_ptr, other_ptr, scale, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(log2 sum e^(t/tau), E_p[Delta], KL)."""
    log_z = 0.0
    kl = 0.0
    mean = 0.0
    tries = 2
    while tries > 0:
        log_z, centre, x_mean, kl, rise = _row_pass(
            *(t_ptr, other_ptr, scale, cap, mean, tries == 2),
            *(VOCABULARY, STACKED, SOFTCAP, BLOCK),
        )
        mean = centre + x_mean
        tries = tl.where((x_mean * x_mean > 16.0 * kl) | (rise > 100.0), tries - 1, 0)
    return log_z, mean, kl


@triton.jit
def _gradient(t, s, delta, scale, log_z, shift):
    """q - p, where log(q/p) = Delta - shift."""
    k = scale * LOG2E
    p = tl.exp2(t * k - log_z)
    q = tl.exp2(s * k - (log_z + shift * LOG2E))
    r = delta * scale - shift
    near = (tl.abs(r) < 0.5) & (p > 0)
    return tl.where(near, p * (r + _exp_less(r, False)), q - p)


@triton.jit
def _kl_kernel(
    teacher_ptr, other_ptr, mask_ptr, weight_ptr, loss_ptr, grad_ptr,
    teacher_stride, other_stride, grad_stride, tau, cap,
    VOCABULARY: tl.constexpr, STACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's loss, and its gradient times the one weight; `grad` may be `other`."""
    LAST: tl.constexpr = (VOCABULARY - 1) // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    t_row, o_row = teacher_ptr + row * teacher_stride, other_ptr + row * other_stride
    grad_row = grad_ptr + row * grad_stride
    lanes = tl.arange(0, BLOCK)
    counts = True
    if MASKED:
        counts = tl.load(mask_ptr + row) != 0
    if counts:
        scale = 1.0 / tau
        log_z, mean, kl = _row_statistics(
            t_row, o_row, scale, cap, VOCABULARY, STACKED, SOFTCAP, BLOCK
        )
        tl.store(loss_ptr + row, kl * tau * tau)
        if GRADIENT:
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
            nothing = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
            for start in range(0, VOCABULARY, BLOCK):
                tl.store(grad_row + start + lanes, nothing, mask=start + lanes < VOCABULARY)


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
        BLOCK=BLOCK,
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
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
