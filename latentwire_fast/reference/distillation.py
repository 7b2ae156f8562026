"""The distillation KL, from logits; `linear_losses` has the head."""

from __future__ import annotations

import torch
from torch import Tensor

from latentwire_fast.reference.precision import compute_dtype

# Above this the textbook statistics of the KL divergence are the accurate ones.
LARGE_KL_SUM = 1.0
BLOCK_ELEMENTS = 2**18


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
    for rows in row_blocks(student):
        s, t = student[rows].to(c), teacher[rows].to(c)
        t = t.masked_fill(s == -torch.inf, -torch.inf)
        stats = kl_statistics(t, s - t, s, tau)
        losses[rows] = stats[2] * tau**2
        if grad is not None:
            block = kl_gradient(t, s - t, s, stats, tau)
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
    for rows in row_blocks(x):
        factor = factors[rows, None]
        x[rows] = (x[rows] * factor).masked_fill_(factor == 0, 0.0).to(x.dtype)


def row_blocks(x: Tensor) -> list[slice]:
    """Rows in blocks of so many elements: temporaries stay near the caches, and small."""
    step = max(1, BLOCK_ELEMENTS // max(1, x.shape[-1]))
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def kl_statistics(t: Tensor, delta: Tensor, s: Tensor, tau: float) -> Tensor:
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


def kl_gradient(t: Tensor, delta: Tensor, s: Tensor, stats: Tensor, tau: float) -> Tensor:
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
