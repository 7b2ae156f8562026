"""Distillation KL on hidden states through the head, without ever holding `[N, V]`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.errors import ConfigError, KernelError
from latentwire_fast.ops.dispatch import (
    check_float,
    check_positive,
    check_shape,
    register,
    uses_triton,
)
from latentwire_fast.ops.distillation import (
    Reduction,
    check_distillation,
    check_vocabulary,
    row_share,
)


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
    settings: dict[str, Any] = {
        "tau": tau,
        "softcap": softcap,
        "chunk_rows": chunk_rows,
        "needs_hidden": needs_hidden,
        "needs_weight": needs_weight,
    }
    if uses_triton(
        "linear_kd_kl", student_hidden, computes_in=reference.compute_dtype(student_hidden)
    ):
        from latentwire_fast.kernels import linear_distillation as kernels

        tensors = (student_hidden, teacher_hidden, weight, teacher_weight)
        same = all(t is None or t.dtype == weight.dtype for t in tensors)
        dtype = weight.dtype if same else torch.float32
        heads = (weight.to(dtype), None if teacher_weight is None else teacher_weight.to(dtype))
        unit = reference.gradient_unit(dtype)
        return kernels.linear_kd_kl(
            student_hidden, teacher_hidden, *heads, mask, **settings, unit=unit
        )
    return reference.linear_kd_kl(
        student_hidden, teacher_hidden, weight, teacher_weight, mask, **settings
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
    check_vocabulary(op, "weight", weight, 0)
    if (weight.dtype == torch.float64) != (student.dtype == torch.float64):
        raise KernelError(
            f"{op}: student_hidden is {student.dtype} and weight {weight.dtype}; expected both in "
            "torch.float64, or neither"
        )
    if teacher_weight is None:
        check_shape(op, "teacher_hidden", teacher, tuple(student.shape), student)
        return
    check_float(op, "teacher_weight", teacher_weight, dims=2)
    width = teacher.shape[-1]
    check_shape(op, "teacher_hidden", teacher, (*student.shape[:-1], width), student)
    check_shape(op, "teacher_weight", teacher_weight, (teacher_weight.shape[0], width), student)
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
    forward call. Memory beyond inputs and gradients is 8 bytes per `chunk_rows * V`, whatever N,
    and with a half precision head 2 more on a GPU, where hidden states and heads that are not all
    of one dtype are multiplied in fp32, with a copy of the head.

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
    check_distillation(op, tau, mask, student_hidden, reduction)
    if not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool) or chunk_rows < 1:
        raise ConfigError(f"{op}: chunk_rows is {chunk_rows!r}; expected an integer of at least 1")
    if softcap is not None:
        check_positive(op, "softcap", softcap, otherwise=", or None")
    trains = torch.is_grad_enabled()
    needs_hidden = trains and student_hidden.requires_grad
    needs_weight = trains and weight.requires_grad
    if needs_weight and reduction == "none":
        raise ConfigError(
            f"{op}: reduction 'none' cannot give the head's gradient; freeze weight, or use 'mean'"
        )
    lead = student_hidden.shape[:-1]
    rows = math.prod(lead)
    student = student_hidden.reshape(rows, student_hidden.shape[-1])
    mask = None if mask is None else mask.reshape(rows)
    loss = _LinearKdKl.apply(
        student,
        teacher_hidden.detach().reshape(rows, teacher_hidden.shape[-1]),
        weight,
        None if teacher_weight is None else teacher_weight.detach(),
        mask,
        (float(tau), float(softcap or 0.0), chunk_rows, needs_hidden, needs_weight),
        reduction == "none",
    )
    if reduction == "none":
        return loss.reshape(lead)
    return loss * row_share(mask, student, reduction)
