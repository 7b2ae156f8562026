"""The distillation KL, from logits and from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from latentwire_fast.reference.precision import compute_dtype

# Above this the textbook statistics of the KL divergence are the accurate ones.
LARGE_KL_SUM = 1.0


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
