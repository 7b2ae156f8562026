"""Distillation KL (K3): on logits, and on hidden states without ever holding `[N, V]`."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.errors import ConfigError, KernelError
from latentwire_fast.ops.dispatch import check_float, check_shape, one_of, register, uses_triton

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def _check_distillation(
    op: str, tau: float, mask: Tensor | None, rows: Tensor, reduction: str
) -> None:
    if not 0 < tau < math.inf:
        raise ConfigError(f"{op}: tau is {tau}; expected a positive number")
    one_of(op, "reduction", reduction, REDUCTIONS)
    if mask is not None and mask.dtype != torch.bool:
        raise KernelError(
            f"{op}: mask is {mask.dtype}; expected torch.bool, True for rows to count"
        )
    check_shape(op, "mask", mask, tuple(rows.shape[:-1]), rows)


def _count(mask: Tensor | None, rows: int) -> Tensor | int:
    """Rows that count, at least 1: without any the mean is 0, found without synchronising."""
    return max(rows, 1) if mask is None else mask.sum().clamp(min=1)


def _kd_kl(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    if uses_triton("kd_kl", student, computes_in=reference.compute_dtype(student)):
        from latentwire_fast.kernels import distill as kernels

        return kernels.kd_kl(student, teacher, tau=tau)
    return reference.kd_kl(student, teacher, tau=tau)


def _kd_kl_fake(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    c, n = reference.compute_dtype(student), student.shape[0]
    return student.new_empty(n, dtype=c), student.new_empty((3, n), dtype=c)


def _kd_kl_backward(
    student: Tensor, teacher: Tensor, stats: Tensor, row_grads: Tensor, tau: float
) -> Tensor:
    if uses_triton("kd_kl", student, computes_in=stats.dtype):
        from latentwire_fast.kernels import distill as kernels

        return kernels.kd_kl_backward(student, teacher, stats, row_grads, tau=tau)
    return reference.kd_kl_backward(student, teacher, stats, row_grads, tau=tau)


register(
    "kd_kl(Tensor student, Tensor teacher, float tau) -> (Tensor, Tensor)", _kd_kl, _kd_kl_fake
)
register(
    "kd_kl_backward(Tensor student, Tensor teacher, Tensor stats, Tensor row_grads, float tau) "
    "-> Tensor",
    _kd_kl_backward,
    lambda student, teacher, stats, row_grads, tau: torch.empty_like(
        student, memory_format=torch.contiguous_format
    ),
)


class _KdKl(torch.autograd.Function):
    """Saves the logits that exist anyway and three numbers per row."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        losses, stats = torch.ops.latentwire_fast.kd_kl(student, teacher, tau)
        ctx.save_for_backward(student, teacher, stats)
        ctx.tau = tau
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, stats = ctx.saved_tensors
        return (
            torch.ops.latentwire_fast.kd_kl_backward(student, teacher, stats, grad, ctx.tau),
            None,
            None,
        )


def kd_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tau: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`tau**2 * KL(softmax(teacher/tau) || softmax(student/tau))`, the distillation loss of Hinton
    et al.

    Accurate from a KL of 1e-7 up, never negative, exactly 0 for identical logits (`reference.kd_kl`
    has the formula). Gradient to the student alone.

    Args:
        student_logits: `[..., V]`. Tokens that it does not have are -inf, and leave both
        distributions.
        teacher_logits: `[..., V]`, of the same vocabulary; -inf is probability 0.
        tau: temperature.
        mask: `[...]` bool, True where a row counts.
        reduction: `mean` over the rows that count (0 without any), their `sum`, or `none`: `[...]`.

    Returns:
        The loss in fp32 (fp64 for fp64 logits).

    Raises:
        ConfigError: tau or reduction; KernelError: shapes or dtypes that do not fit.
    """
    op = "kd_kl"
    check_float(op, "student_logits", student_logits, dims=1)
    check_float(op, "teacher_logits", teacher_logits, dims=1)
    check_shape(op, "teacher_logits", teacher_logits, tuple(student_logits.shape), student_logits)
    _check_distillation(op, tau, mask, student_logits, reduction)
    *lead, vocabulary = student_logits.shape
    rows = math.prod(lead)
    losses = _KdKl.apply(
        student_logits.reshape(rows, vocabulary),
        teacher_logits.detach().reshape(rows, vocabulary),
        float(tau),
    )
    if mask is not None:
        losses = torch.where(mask.reshape(rows), losses, 0.0)
    if reduction == "none":
        return losses.reshape(lead)
    return losses.sum() if reduction == "sum" else losses.sum() / _count(mask, rows)


def _linear_kd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    mask: Tensor | None,
    tau: float,
    softcap: float,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = reference.linear_kd_kl
    if uses_triton(
        "linear_kd_kl", student_hidden, computes_in=reference.compute_dtype(student_hidden)
    ):
        from latentwire_fast.kernels import distill as kernels

        implementation = kernels.linear_kd_kl
    return implementation(
        student_hidden,
        teacher_hidden,
        weight,
        teacher_weight,
        mask,
        tau=tau,
        softcap=softcap,
        chunk_rows=chunk_rows,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
    )


def _linear_kd_kl_fake(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    mask: Tensor | None,
    tau: float,
    softcap: float,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c, n = reference.compute_dtype(student_hidden), student_hidden.shape[0]
    (vocabulary, width) = weight.shape
    return (
        student_hidden.new_empty(n, dtype=c),
        student_hidden.new_empty((n if needs_hidden else 0, width), dtype=c),
        student_hidden.new_empty((vocabulary if needs_weight else 0, width), dtype=c),
    )


register(
    "linear_kd_kl(Tensor student_hidden, Tensor teacher_hidden, Tensor weight, "
    "Tensor? teacher_weight, Tensor? mask, float tau, float softcap, int chunk_rows, "
    "bool needs_hidden, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _linear_kd_kl,
    _linear_kd_kl_fake,
)


class _LinearKdKl(torch.autograd.Function):
    """The gradients are made in the forward call, while a chunk's logits exist; backward scales
    them.

    Returns the sum of the row losses, or with `per_row` the losses `[N]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        weight: Tensor,
        teacher_weight: Tensor | None,
        mask: Tensor | None,
        settings: tuple[float, float, int, bool, bool],
        per_row: bool,
    ) -> Tensor:
        losses, d_hidden, d_weight = torch.ops.latentwire_fast.linear_kd_kl(
            student_hidden, teacher_hidden, weight, teacher_weight, mask, *settings
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = student_hidden.dtype, weight.dtype
        return losses if per_row else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        hidden = head = None
        if ctx.needs_input_grad[0]:
            hidden = (d_hidden * (grad[:, None] if grad.dim() else grad)).to(hidden_dtype)
        if ctx.needs_input_grad[2]:
            head = (d_weight * grad).to(weight_dtype)
        return hidden, None, head, None, None, None, None


def _check_heads(
    op: str, student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor | None
) -> None:
    for name, x in (("student_hidden", student), ("teacher_hidden", teacher), ("weight", weight)):
        check_float(op, name, x, dims=2 if name == "weight" else 1)
    check_shape(op, "weight", weight, (weight.shape[0], student.shape[-1]), student)
    if teacher_weight is None:
        check_shape(op, "teacher_hidden", teacher, tuple(student.shape), student)
        return
    check_float(op, "teacher_weight", teacher_weight, dims=2)
    check_shape(
        op, "teacher_hidden", teacher, (*student.shape[:-1], teacher_weight.shape[1]), student
    )
    if teacher_weight.shape[0] < weight.shape[0]:
        raise KernelError(
            f"{op}: teacher_weight has {teacher_weight.shape[0]} rows (tokens); expected at least "
            f"the student's {weight.shape[0]}"
        )


def linear_kd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    tau: float = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int = 1024,
    reduction: Reduction = "mean",
    softcap: float | None = None,
) -> Tensor:
    """`kd_kl` of two models' logits, from the hidden states before their heads: never holds `[N,
    V]`.

    Gradients go to `student_hidden`, and to `weight` if it requires one; they are made in the
    forward call. Memory beyond inputs and gradients is a few times `chunk_rows * V` numbers,
    whatever N.

    Args:
        student_hidden: `[..., d]`; teacher_hidden: `[..., d]`, or `[..., d_t]` with its own head.
        weight: `[V, d]`, the student's head (and the teacher's, without `teacher_weight`).
        teacher_weight: `[V_t, d_t]`, V_t >= V: the first V tokens are the student's, and only they
        count. tau, mask, reduction: as in `kd_kl`.
        chunk_rows: rows whose logits are held at a time.
        softcap: logits are `softcap * tanh(logits / softcap)` first (Gemma 2).

    Returns:
        The loss in fp32 (fp64 for fp64 hidden states).

    Raises:
        ConfigError: tau, reduction, chunk_rows or softcap; reduction `none` with a trained head.
        KernelError: shapes or dtypes that do not fit.
    """
    op = "linear_kd_kl"
    _check_heads(op, student_hidden, teacher_hidden, weight, teacher_weight)
    _check_distillation(op, tau, mask, student_hidden, reduction)
    if chunk_rows < 1:
        raise ConfigError(f"{op}: chunk_rows is {chunk_rows}; expected at least 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ConfigError(f"{op}: softcap is {softcap}; expected a positive number, or None")
    trains = torch.is_grad_enabled()
    needs_hidden = trains and student_hidden.requires_grad
    needs_weight = trains and weight.requires_grad
    if needs_weight and reduction == "none":
        raise ConfigError(
            f"{op}: reduction 'none' cannot give the head's gradient; freeze weight, or use 'mean'"
        )
    lead = student_hidden.shape[:-1]
    rows = math.prod(lead)
    loss = _LinearKdKl.apply(
        student_hidden.reshape(rows, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(rows, teacher_hidden.shape[-1]),
        weight,
        None if teacher_weight is None else teacher_weight.detach(),
        None if mask is None else mask.reshape(rows),
        (float(tau), float(softcap or 0.0), chunk_rows, needs_hidden, needs_weight),
        reduction == "none",
    )
    if reduction == "none":
        return loss.reshape(lead)
    return loss if reduction == "sum" else loss / _count(mask, rows)
