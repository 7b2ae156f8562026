"""Every op as its formula in plain torch: the specification, the CPU path, the tests' oracle.

Shapes: `B` batch, `M` latents, `d` latent width, `n = M*d`, `G` groups of `g` values, `D` reader
width, `N` rows (tokens), `V` vocabulary. Arithmetic is fp32, or fp64 for fp64 inputs, whatever the
storage dtype. Nothing here checks its arguments: `latentwire_fast.ops` does, and is what other
modules call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_FP16 = 65504.0
LAYER_NORM_EPS = 1e-5
# Far below any embedding's mean square (an LLM's is 1e-4 and up), far above fp32's smallest normal.
RMS_EPS = 1e-8
# Above this the textbook statistics of the KL divergence are the accurate ones.
LARGE_KL_SUM = 1.0


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that arithmetic on `x` is done in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- K1: group quantisation -----------------------------------------------------------------------


def code_bytes(values: int, *, bits: int, group_size: int) -> int:
    """Bytes of the packed codes of `values` numbers.

    Groups follow one another, each byte aligned. A group of r values takes r bytes at 8 bits and
    ceil(r/2) at 4 bits; at 6 bits a plane of the codes' low 4 bits, ceil(r/2) bytes, and then a
    plane of their high 2 bits, ceil(r/4) bytes. Only the last group can have r < group_size.
    """

    def group(r: int) -> int:
        return {8: r, 4: -(-r // 2), 6: -(-r // 2) + -(-r // 4)}[bits]

    # No divmod: `values` is symbolic when shapes are traced.
    return values // group_size * group(group_size) + group(values % group_size)


def quantize(
    z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """Symmetric group quantisation: `(codes [B, G, g] int8, scales [B, G] fp16)`.

    `scale = fp16(min(amax / qmax, 65504))`, `code = clamp(round_half_even(z / scale), -qmax, qmax)`
    with the rounded scale and `qmax = 2**(bits - 1) - 1`; scale 0 gives codes 0. A short last group
    is filled up with zeros. A group that holds NaN or Inf gets the scale NaN.

    With `clip` the divisor is `qmax + 1/2` (7.5 at 4 bits): steps are finer, and the largest values
    are clamped to a code half a step away, no further than rounding takes any other value.

    Without clip, quantising what was dequantised gives the same again, except where fp16's
    subnormals round the scale too coarsely for its largest code to be qmax: scales below qmax *
    2**-24, that is groups whose largest value is under qmax**2 * 2**-24 (1e-3 at 8 bits, 3e-6 at
    4).
    """
    qmax = 2 ** (bits - 1) - 1
    padding = -z_Bn.shape[-1] % group_size
    z = F.pad(z_Bn.float(), (0, padding)).unflatten(-1, (-1, group_size))
    amax = z.abs().amax(-1)
    scale = (amax / (qmax + 0.5 if clip else qmax)).clamp(max=LARGEST_FP16)
    scale = scale.masked_fill(~amax.isfinite(), torch.nan)
    scales = scale.to(torch.float16)
    step = scales.float().unsqueeze(-1)
    codes = torch.where(step > 0, z / step, 0.0).round().clamp(-qmax, qmax)
    return codes.to(torch.int8), scales


def _join(parts: Tensor, *, per_byte: int) -> Tensor:
    """Put `per_byte` neighbours (last dim, each below `2**(8 // per_byte)`) in a byte."""
    parts = parts.unflatten(-1, (-1, per_byte))
    width = 8 // per_byte
    joined = parts[..., 0]
    for i in range(1, per_byte):
        joined = joined | (parts[..., i] << (i * width))
    return joined


def _split(packed: Tensor, *, per_byte: int) -> Tensor:
    """The inverse of `_join`."""
    width = 8 // per_byte
    parts = [(packed >> (i * width)) & (2**width - 1) for i in range(per_byte)]
    return torch.stack(parts, -1).flatten(-2)


def pack_codes(codes_BGg: Tensor, *, values: int, bits: int) -> Tensor:
    """Two's complement codes `[B, G, g]` int8 to bytes `[B, code_bytes]`, laid out as that says.

    Within a byte the first value has the lowest bits; unused bits are zero.
    """
    codes = codes_BGg.view(torch.uint8)
    if bits == 8:
        return codes.flatten(-2)[..., :values]
    low = _join(codes & 15, per_byte=2)
    if bits == 4:
        return low.flatten(-2)[..., : -(-values // 2)]
    high = _join((codes >> 4) & 3, per_byte=4)
    full, rest = divmod(values, codes.shape[-1])
    planes = torch.cat((low[..., :full, :], high[..., :full, :]), -1).flatten(-2)
    if not rest:
        return planes
    tail = low[..., full, : -(-rest // 2)], high[..., full, : -(-rest // 4)]
    return torch.cat((planes, *tail), -1)


def unpack_codes(codes_Bb: Tensor, *, values: int, bits: int, group_size: int) -> Tensor:
    """Bytes `[B, code_bytes]` to codes `[B, n]` int8; the inverse of `pack_codes`."""
    if bits == 8:
        return codes_Bb.view(torch.int8)
    if bits == 4:
        codes = _split(codes_Bb, per_byte=2)[..., :values]
    else:
        full, rest = divmod(values, group_size)
        cut = full * group_size * 6 // 8
        groups = codes_Bb[..., :cut].unflatten(-1, (full, group_size * 6 // 8))
        half = group_size // 2
        low = _split(groups[..., :half], per_byte=2).flatten(-2)
        high = _split(groups[..., half:], per_byte=4).flatten(-2)
        middle = cut + -(-rest // 2)
        low = torch.cat((low, _split(codes_Bb[..., cut:middle], per_byte=2)[..., :rest]), -1)
        high = torch.cat((high, _split(codes_Bb[..., middle:], per_byte=4)[..., :rest]), -1)
        codes = low | (high << 4)
    # Sign extension: shift the code's top bit into the byte's, and back arithmetically.
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)


def quantize_pack(
    z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """`(packed codes [B, code_bytes] uint8, scales [B, G] fp16)`."""
    codes, scales = quantize(z_Bn, bits=bits, group_size=group_size, clip=clip)
    return pack_codes(codes, values=z_Bn.shape[-1], bits=bits).contiguous(), scales


def unpack_dequantize(
    codes_Bb: Tensor,
    scales_BG: Tensor,
    *,
    bits: int,
    group_size: int,
    values: int,
    dtype: torch.dtype,
) -> Tensor:
    """`code * scale` in fp32, `[B, n]` in `dtype`."""
    codes = unpack_codes(codes_Bb, values=values, bits=bits, group_size=group_size).float()
    steps = scales_BG.float().repeat_interleave(group_size, -1)[..., :values]
    return (codes * steps).to(dtype)


def fake_quantize(z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False) -> Tensor:
    """`unpack_dequantize(quantize_pack(z))` in z's dtype; a group with NaN or Inf becomes NaN."""
    codes, scales = quantize(z_Bn, bits=bits, group_size=group_size, clip=clip)
    values = (codes.float() * scales.float().unsqueeze(-1)).flatten(-2)
    return values[..., : z_Bn.shape[-1]].to(z_Bn.dtype).contiguous()


# --- K2: projection and RMS calibration -----------------------------------------------------------

# The dimensions of y `[..., M, D]` that share one mean square.
CALIBRATION_DIMS: dict[str, tuple[int, ...]] = {"token": (-1,), "example": (-2, -1), "batch": ()}


def _projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, the normalised x, and for LayerNorm's backward the standardised x and 1/deviation."""
    c = compute_dtype(x)
    normed, standard, rstd = x.to(c), None, None
    if norm_weight is not None:
        centred = normed - normed.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        standard = centred * rstd
        normed = standard * norm_weight.to(c)
        normed = normed if norm_bias is None else normed + norm_bias.to(c)
    y = F.linear(normed, weight.to(c), None if bias is None else bias.to(c))
    return (y.tanh() if tanh else y), normed, standard, rstd


def _unit_scale(mean_square: Tensor, target_rms: float, calibration: str) -> Tensor | float:
    """The calibration's factor without the gain's tensor part."""
    if calibration == "none":
        return target_rms
    return target_rms * (mean_square + RMS_EPS).rsqrt()


def project_calibrate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    gain: Tensor | None,
    target_rms: float,
    calibration: str,
    tanh: bool,
) -> tuple[Tensor, Tensor]:
    """`gamma * s * y + beta`, `y = W norm(x) + b` (or its tanh), `s = target_rms * gain / rms(y)`.

    Returns `out [..., M, D]` in x's dtype, and the mean squares of y (`[..., M, 1]` per token,
    `[..., 1, 1]` per example, all dimensions 1 per batch, empty with calibration `none`, where
    `s = target_rms * gain`).
    """
    y, *_ = _projected(x, weight, bias, norm_weight, norm_bias, tanh)
    if calibration == "none":
        mean_square = y.new_empty(0)
    else:
        mean_square = y.square().mean(CALIBRATION_DIMS[calibration] or None, keepdim=True)
    out = y * _unit_scale(mean_square, target_rms, calibration)
    if gain is not None:
        out = out * gain.to(y.dtype)
    if gamma is not None:
        out = out * gamma.to(y.dtype)
    if beta is not None:
        out = out + beta.to(y.dtype)
    return out.to(x.dtype), mean_square


def dequantize_project_calibrate(
    codes_Bb: Tensor,
    scales_BG: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *projection: Any,
) -> Tensor:
    """`project_calibrate` of the latent, of a shape `[..., M, d]`, that the codes stand for.

    Rounded to `dtype` once, at the end.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = unpack_dequantize(
        *(codes_Bb, scales_BG),
        bits=bits,
        group_size=group_size,
        values=shape[-2] * shape[-1],
        dtype=wide,
    )
    return project_calibrate(x.view(*shape), *projection)[0].to(dtype)


def project_calibrate_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    gain: Tensor | None,
    mean_square: Tensor,
    target_rms: float,
    calibration: str,
    tanh: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, norm_weight, norm_bias, gamma, beta, gain; None if not needed.

    With `v = gamma * dout` and the sums over the values that share a mean square r2 of count c:
    `dy = s*v - y * s * sum(v*y) / (c * (r2 + eps))`.
    """
    y, normed, standard, rstd = _projected(x, weight, bias, norm_weight, norm_bias, tanh)
    c = y.dtype
    rows = tuple(range(y.dim() - 1))
    unit = _unit_scale(mean_square, target_rms, calibration)
    s = unit if gain is None else unit * gain.to(c)
    dout = grad.to(c)
    v = dout if gamma is None else dout * gamma.to(c)
    d_gamma = (dout * y * s).sum(rows) if needs[5] else None
    d_beta = dout.sum(rows) if needs[6] else None
    d_gain = (v * y * unit).sum() if needs[7] else None
    dy = v * s
    if calibration != "none":
        shared = CALIBRATION_DIMS[calibration] or tuple(range(y.dim()))
        count = y.numel() // max(mean_square.numel(), 1)
        along = (v * y).sum(shared, keepdim=True) / (count * (mean_square + RMS_EPS))
        dy = dy - y * (s * along)
    if tanh:
        dy = dy * (1 - y.square())
    d_weight = dy.flatten(0, -2).T @ normed.flatten(0, -2) if needs[1] else None
    d_bias = dy.sum(rows) if needs[2] else None
    d_norm_weight = d_norm_bias = d_x = None
    if needs[0] or needs[3] or needs[4]:
        d_x = dy @ weight.to(c)
    if standard is not None and rstd is not None and norm_weight is not None and d_x is not None:
        d_norm_weight = (d_x * standard).sum(rows)
        d_norm_bias = d_x.sum(rows)
        h = d_x * norm_weight.to(c)
        mean = h.mean(-1, keepdim=True)
        d_x = rstd * (h - mean - standard * (h * standard).mean(-1, keepdim=True))
    grads = (d_x, d_weight, d_bias, d_norm_weight, d_norm_bias, d_gamma, d_beta, d_gain)
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


# --- K3: distillation KL --------------------------------------------------------------------------


def _expm1_less_x(x: Tensor) -> Tensor:
    """`exp(x) - 1 - x` without cancellation (never negative)."""
    terms = 14 if x.dtype == torch.float64 else 8
    series = torch.ones_like(x)
    for k in range(terms, 2, -1):
        series.mul_(x / k).add_(1.0)
    return torch.where(x.abs() < 0.5, 0.5 * x.square() * series, torch.expm1(x) - x)


def gradient_unit(dtype: torch.dtype) -> float:
    """What q - p is multiplied by while it is stored in `dtype`, to be taken out again in fp32.

    |q - p| <= 1, and over a vocabulary of 128k nearly all of it is below fp16's smallest number.
    """
    return 32768.0 if dtype == torch.float16 else 1.0


def kd_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """`tau**2 * KL(softmax(teacher/tau) || softmax(student/tau))` `[N]`, of the rows of `[N, V]`.

    With `Delta = (student - teacher) / tau`, `p = softmax(teacher/tau)`, `x = Delta - E_p[Delta]`:
    `KL = log E_p[e^x] = log1p(E_p[e^x - 1 - x])`, whose terms are all positive, so nothing cancels.
    Once that sum passes 1, `logsumexp(s) - logsumexp(t) - E_p[Delta]` is the accurate form.

    Teacher logits of -inf have probability 0. Student logits of -inf are tokens that the student
    does not have: both distributions are taken over the others.

    Args:
        mask: `[N]` bool, True where a row counts; the losses and gradients of the others are 0,
            whatever they hold.
        grad: `[N, V]` in student's dtype, or `student` itself: takes the gradient of each row's
            loss, times `weight` (0-dim) if given.
    """
    c = compute_dtype(student)
    losses = student.new_empty(student.shape[0], dtype=c)
    for rows in _row_blocks(student):
        s, t = student[rows].to(c), teacher[rows].to(c)
        t = t.masked_fill(s == -torch.inf, -torch.inf)
        stats = _kl_statistics(t, s - t, s, tau)
        losses[rows] = stats[2] * tau**2
        if grad is not None:
            block = _kl_gradient(t, s - t, s, stats, tau)
            if weight is not None:
                block.mul_(weight)
            if mask is not None:
                block.masked_fill_(~mask[rows, None], 0.0)
            grad[rows] = block.to(grad.dtype)
    return losses if mask is None else losses.masked_fill_(~mask, 0.0)


def scale_rows(x: Tensor, factors: Tensor) -> None:
    """Multiply the rows of x `[N, V]` by `factors` (0-dim, or `[N]`), in place.

    A factor of 0 leaves zeros, whatever the row holds.
    """
    factors = factors.expand(x.shape[0])
    for rows in _row_blocks(x):
        factor = factors[rows, None]
        x[rows] = (x[rows] * factor).masked_fill_(factor == 0, 0.0).to(x.dtype)


def _row_blocks(x: Tensor) -> list[slice]:
    """Rows in blocks of about a million elements: temporaries stay near the caches, and small."""
    step = max(1, 2**20 // max(1, x.shape[-1]))
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def _kl_statistics(t: Tensor, delta: Tensor, s: Tensor, tau: float) -> Tensor:
    """`[3, N]` of rows t, s and delta = s - t: logsumexp(t/tau), E_p[Delta], KL without tau**2."""
    log_z = torch.logsumexp(t / tau, -1)
    p = torch.exp(t / tau - log_z[:, None])
    live = p > 0
    delta = torch.where(live, delta / tau, 0.0)
    centre = (p * delta).sum(-1) / p.sum(-1)  # p sums to 1 but for rounding, which counts here
    x = torch.where(live, delta - centre[:, None], 0.0)
    near = live & (x <= 1)
    q_z = torch.exp(s / tau - (log_z + centre)[:, None])  # p * e^x, also where p is 0
    far = q_z - p * (1 + x)
    excess = torch.where(near, p * _expm1_less_x(x.clamp(max=1)), far).sum(-1)
    textbook = torch.logsumexp(s / tau, -1) - log_z - centre
    kl = torch.where(excess <= LARGE_KL_SUM, torch.log1p(excess), textbook)
    return torch.stack((log_z, centre, kl))


def _kl_gradient(t: Tensor, delta: Tensor, s: Tensor, stats: Tensor, tau: float) -> Tensor:
    """`tau * (q - p) = tau * p * expm1(log(q/p))` with `log(q/p) = Delta - E_p[Delta] - KL`.

    Where q is more than e times p (p may be 0) the plain difference is as accurate, and cannot
    overflow.
    """
    log_z, centre, kl = stats[..., None].unbind(0)
    log_p = t / tau - log_z
    ratio = delta / tau - centre - kl
    near = ratio <= 1
    p = log_p.exp_()
    q = torch.exp(s / tau - (log_z + centre + kl))
    small = p * torch.expm1(torch.where(near, ratio, 0.0))
    return torch.where(near, small, q - p).mul_(tau)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`kd_kl` of `student_hidden @ weight.T` against the teacher's, without ever holding `[N, V]`.

    With one head for both, the difference of the logits is the head applied to the difference of
    the hidden states: rounding then is relative to the difference, not to the logits. A softcap c
    turns a logit z into `c*tanh(z/c)`, and the difference into `c*tanh(delta/c)*(1 -
    tanh(t/c)*tanh(s/c))`. Holds two `[chunk_rows, V]` buffers, and the head once more in fp32 if it
    is in a half precision.

    Returns:
        The losses `[N]` (0 where masked), their gradients with respect to `student_hidden` `[N, d]`
        (each row its own loss's), and the gradient of the losses' sum with respect to `weight` `[V,
        d]`; empty where not needed.
    """
    c = compute_dtype(student_hidden)
    n = student_hidden.shape[0]
    losses = student_hidden.new_zeros(n, dtype=c)
    d_hidden = student_hidden.new_zeros((n if needs_hidden else 0, weight.shape[1]), dtype=c)
    d_weight = torch.zeros_like(weight if needs_weight else weight[:0], dtype=c)
    valid = torch.arange(n, device=losses.device) if mask is None else mask.nonzero().squeeze(1)
    head = weight.to(c)
    other = None if teacher_weight is None else teacher_weight[: weight.shape[0]].to(c)
    for rows in valid.split(chunk_rows):
        hidden = student_hidden[rows].to(c)
        h_teacher = teacher_hidden[rows].to(c)
        if other is None:
            t = h_teacher @ head.T
            delta = (hidden - h_teacher) @ head.T
        else:
            t = h_teacher @ other.T
            delta = (hidden @ head.T).sub_(t)
        for block in _row_blocks(t):
            kl, grad = _linear_block(t[block], delta[block], tau, softcap)
            losses[rows[block]] = kl
            t[block] = grad  # the logits are done with: their buffer takes the gradient
        del delta
        if needs_hidden:
            d_hidden[rows] = t @ head
        if needs_weight:
            d_weight.addmm_(t.T, hidden)
    return losses, d_hidden, d_weight


def _linear_block(t: Tensor, delta: Tensor, tau: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Losses `[R]` and the gradient of the student's logits before the cap `[R, V]`."""
    s = t + delta
    if not softcap:
        stats = _kl_statistics(t, delta, s, tau)
        return stats[2] * tau**2, _kl_gradient(t, delta, s, stats, tau)
    t, s = torch.tanh(t / softcap), torch.tanh(s / softcap)
    delta = softcap * torch.tanh(delta / softcap) * (1 - t * s)
    slope = 1 - s.square()
    t, s = softcap * t, softcap * s
    stats = _kl_statistics(t, delta, s, tau)
    return stats[2] * tau**2, _kl_gradient(t, delta, s, stats, tau).mul_(slope)
