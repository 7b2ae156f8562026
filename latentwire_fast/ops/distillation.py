"""Distillation KL on logits, with the student's gradient made in the forward call."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.errors import KernelError
from latentwire_fast.ops.dispatch import (
    check_float,
    check_positive,
    check_shape,
    check_tensor,
    one_of,
    register,
    uses_triton,
)

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def check_distillation(
    op: str, tau: float, mask: Tensor | None, rows: Tensor, reduction: str
) -> None:
    check_positive(op, "tau", tau)
    one_of(op, "reduction", reduction, REDUCTIONS)
    if mask is not None:
        check_tensor(op, "mask", mask)
        if mask.dtype != torch.bool:
            raise KernelError(
                f"{op}: mask is {mask.dtype}; expected torch.bool, True for rows to count"
            )
    check_shape(op, "mask", mask, tuple(rows.shape[:-1]), rows)


def check_vocabulary(op: str, argument: str, x: Tensor, dim: int) -> None:
    if not x.shape[dim]:
        raise KernelError(
            f"{op}: {argument} has shape {tuple(x.shape)}; expected at least one token"
        )


def _is_of_a_leaf(x: Tensor) -> bool:
    """Whether x, which requires a gradient, is a leaf, a view of one, or shares one's memory.

    The last is found where x is the direct result of a function of the leaf that returns an alias.
    """
    if x.is_leaf or (x._base is not None and x._base.is_leaf and x._base.requires_grad):
        return True
    if torch.compiler.is_compiling() or x.grad_fn is None:
        return False
    # Only leaves' nodes have the attribute.
    leaves = (getattr(node, "variable", None) for node, _ in x.grad_fn.next_functions)
    memory = x.untyped_storage()._cdata  # of the storage itself: empty ones share the address 0
    return any(leaf is not None and leaf.untyped_storage()._cdata == memory for leaf in leaves)


def _check_in_place(op: str, student: Tensor) -> None:
    if _is_of_a_leaf(student):
        raise KernelError(
            f"{op}: in_place on a leaf, or a view of one, would overwrite it with the gradient of "
            "student_logits; expected the output of another op"
        )
    if not student.is_contiguous():
        raise KernelError(
            f"{op}: in_place on student_logits with strides {student.stride()}; expected contiguous"
        )


def row_share(mask: Tensor | None, rows: Tensor, reduction: Reduction) -> Tensor:
    """What a row's loss counts for in the result, 0-dim in the dtype computed in.

    Without any row that counts the mean is 0. Found without synchronising with the host.
    """
    c = reference.compute_dtype(rows)
    if reduction != "mean" or mask is None:
        value = 1.0 / max(rows.shape[0], 1) if reduction == "mean" else 1.0
        return rows.new_full((), value, dtype=c)
    return 1.0 / mask.sum().clamp(min=1).to(c)


def _losses(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    tau: float,
    grad: Tensor | None,
) -> Tensor:
    rows_kl = reference.kd_kl
    if uses_triton("kd_kl", student, computes_in=reference.compute_dtype(student)):
        from latentwire_fast.kernels import distillation as kernels

        rows_kl = kernels.kd_kl
    return rows_kl(student, teacher, tau=tau, mask=mask, weight=weight, grad=grad)


def _kd_kl(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    grad = student.new_empty((student.shape[0] if weight is not None else 0, student.shape[1]))
    into = None if weight is None else grad
    return _losses(student, teacher, mask, weight, tau, into), grad


def _kd_kl_fake(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    n, vocabulary = student.shape
    losses = student.new_empty(n, dtype=reference.compute_dtype(student))
    return losses, student.new_empty((n if weight is not None else 0, vocabulary))


def _kd_kl_in_place(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor, tau: float
) -> Tensor:
    return _losses(student, teacher, mask, weight, tau, student)


def _scale_rows(x: Tensor, factors: Tensor) -> None:
    if uses_triton("kd_kl", x, computes_in=reference.compute_dtype(x)):
        from latentwire_fast.kernels import distillation as kernels

        kernels.scale_rows(x, factors)
    else:
        reference.scale_rows(x, factors)


register(
    "kd_kl(Tensor student, Tensor teacher, Tensor? mask, Tensor? weight, float tau) "
    "-> (Tensor, Tensor)",
    _kd_kl,
    _kd_kl_fake,
)
register(
    "kd_kl_in_place(Tensor(a!) student, Tensor teacher, Tensor? mask, Tensor weight, float tau) "
    "-> Tensor",
    _kd_kl_in_place,
    lambda student, *_: student.new_empty(student.shape[0], dtype=reference.compute_dtype(student)),
)
register("scale_rows(Tensor(a!) x, Tensor factors) -> ()", _scale_rows, lambda x, factors: None)


def _graph_is_kept() -> bool:
    """Whether this backward pass leaves its graph for another (`retain_graph`), with what it saved.

    A compiled backward scales out of place wherever that matters.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _KdKl(torch.autograd.Function):
    """The gradient of the result is made in the forward call, in a buffer of its own or in the
    student's logits; backward scales it where it lies, by the incoming gradient.

    Returns the row losses times `share`, summed, or with `per_row` the losses `[N]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        share: Tensor,
        tau: float,
        per_row: bool,
        in_place: bool,
    ) -> Tensor:
        unit = reference.gradient_unit(student.dtype)
        # Where the stored gradient is the result's own, an incoming gradient of 1 costs nothing.
        ctx.left = tau / unit if unit != 1.0 else None
        weight = share if unit == 1.0 else torch.full_like(share, unit / tau)
        if in_place:
            grad = student.detach()
            losses = torch.ops.latentwire_fast.kd_kl_in_place(grad, teacher, mask, weight, tau)
            torch.autograd.graph.increment_version(student)
        else:
            losses, grad = torch.ops.latentwire_fast.kd_kl(student, teacher, mask, weight, tau)
        ctx.save_for_backward(grad, share)
        return losses if per_row else losses.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad, share = ctx.saved_tensors
        factors = grad_output if ctx.left is None else grad_output * (share * ctx.left)
        if _graph_is_kept():
            grad = grad.clone()
        torch.ops.latentwire_fast.scale_rows(grad, factors)
        return grad, *[None] * 6


def kd_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tau: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    in_place: bool = False,
) -> Tensor:
    """`tau**2 * KL(softmax(teacher/tau) || softmax(student/tau))`, the distillation loss of Hinton
    et al.

    Accurate from a KL of 1e-7 up, never negative, exactly 0 for identical logits (`reference.kd_kl`
    has the formula). Gradient to the student alone, made in the forward call.

    Args:
        student_logits: `[..., V]`. Tokens that it does not have are -inf, and leave both
        distributions.
        teacher_logits: `[..., V]`, of the same vocabulary; -inf is probability 0.
        tau: temperature.
        mask: `[...]` bool, True where a row counts.
        reduction: `mean` over the rows that count (0 without any), their `sum`, or `none`: `[...]`.
        in_place: the gradient, if one is needed, takes the place of `student_logits`, which are
        lost; nothing else of their size is allocated. They must be contiguous, and no leaf (a
        parameter) or view of one, which would be overwritten.

    Returns:
        The loss in fp32 (fp64 for fp64 logits).

    Raises:
        ConfigError: tau or reduction; KernelError: shapes, dtypes or layouts that do not fit.
    """
    op = "kd_kl"
    check_float(op, "student_logits", student_logits, dims=1)
    check_float(op, "teacher_logits", teacher_logits, dims=1)
    check_shape(op, "teacher_logits", teacher_logits, tuple(student_logits.shape), student_logits)
    check_distillation(op, tau, mask, student_logits, reduction)
    check_vocabulary(op, "student_logits", student_logits, -1)
    needs_grad = torch.is_grad_enabled() and student_logits.requires_grad
    if in_place and needs_grad:
        _check_in_place(op, student_logits)
    *lead, vocabulary = student_logits.shape
    rows, tau = math.prod(lead), float(tau)
    student = student_logits.reshape(rows, vocabulary)
    teacher = teacher_logits.detach().reshape(rows, vocabulary)
    mask = None if mask is None else mask.reshape(rows)
    share = row_share(mask, student, reduction)
    if needs_grad:
        per_row = reduction == "none"
        loss = _KdKl.apply(student, teacher, mask, share, tau, per_row, in_place)
    else:
        loss, _ = torch.ops.latentwire_fast.kd_kl(student, teacher, mask, None, tau)
        loss = loss if reduction == "none" else loss.sum() * share
    return loss.reshape(lead) if reduction == "none" else loss
