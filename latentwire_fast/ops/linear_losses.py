"""Cross-entropy and distillation KL on hidden states through the head, without ever holding `[N,
V]`: what `linear_cross_entropy_kd` and `linear_kd_kl`, its second term alone, run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.ops.dispatch import autocast_dtype, register, uses_triton
from latentwire_fast.ops.distillation import Reduction
from latentwire_fast.reference import Heads, LossResults, LossRows, LossSettings

# What a call may hold beside inputs and gradients: a quarter of [N, V], and so many bytes at most;
# but always so many that few rows are not multiplied one by one, each time with the whole head.
WORKSPACE_SHARE, WORKSPACE_BYTES, WORKSPACE_LEAST_BYTES = 4, 2**29, 2**25
# Tensors of a block's size that the reference holds at a time while it computes one.
_BLOCK_TENSORS = 12

# Settings that depend on the rows; `scored` fills them in.
UNKNOWN: dict[str, Any] = {
    "needs_hidden": False,
    "needs_weight": False,
    "needs_bias": False,
    "dtype": None,
}

_ROWS = len(LossRows._fields)
_TENSORS = _ROWS + len(Heads._fields)


def _gathered(arguments: tuple[Any, ...]) -> tuple[LossRows, Heads, LossSettings]:
    """The objects of an op's arguments."""
    rows, heads, rest = arguments[:_ROWS], arguments[_ROWS:_TENSORS], arguments[_TENSORS:]
    return LossRows(*rows), Heads(*heads), LossSettings(*rest)


def _linear_losses(*arguments: Any) -> tuple[Tensor, ...]:
    rows, heads, settings = _gathered(arguments)
    c = reference.compute_dtype(rows.hidden)
    if not uses_triton("linear_losses", rows.hidden, computes_in=c):
        return tuple(reference.linear_losses(rows, heads, settings))
    from latentwire_fast.kernels import linear_losses as kernels

    factors = (rows.hidden, rows.teacher_hidden, heads.weight, heads.teacher_weight)
    same = all(x is None or x.dtype == heads.weight.dtype for x in factors)
    dtype = settings.dtype or (heads.weight.dtype if same else torch.float32)
    other = heads.teacher_weight
    heads = heads._replace(
        weight=heads.weight.to(dtype), teacher_weight=None if other is None else other.to(dtype)
    )
    unit = reference.gradient_unit(dtype)
    return tuple(
        kernels.linear_losses(rows, heads, settings, reference.row_factors(rows), unit=unit)
    )


def _linear_losses_fake(*arguments: Any) -> tuple[Tensor, ...]:
    rows, heads, settings = _gathered(arguments)
    c = reference.compute_dtype(rows.hidden)
    shapes = reference.result_shapes(rows, heads, settings)
    return tuple(rows.hidden.new_empty(shape, dtype=c) for shape in shapes)


register(
    "linear_losses(Tensor hidden, Tensor? labels, Tensor? label_weights, Tensor? teacher_hidden, "
    "Tensor? kd_weights, Tensor weight, Tensor? bias, Tensor? teacher_weight, "
    "Tensor? teacher_bias, float tau, float scale, float softcap, float smoothing, "
    "int vocabulary, int chunk_rows, bool label_gradient, bool kd_gradient, bool needs_hidden, "
    "bool needs_weight, bool needs_bias, ScalarType? dtype) "
    f"-> ({', '.join(['Tensor'] * len(LossResults._fields))})",
    _linear_losses,
    _linear_losses_fake,
)


class _LinearLosses(torch.autograd.Function):
    """The gradients of both terms are made in the forward call, while a chunk's logits exist;
    backward scales and adds them.

    Returns cross-entropy, KL and what is correct, each summed over rows, or with `per_row` `[N]`.
    """

    @staticmethod
    def forward(ctx: Any, per_row: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, heads, settings = _gathered(arguments)
        results = LossResults(*torch.ops.latentwire_fast.linear_losses(*arguments))
        ctx.save_for_backward(results.d_hidden, results.d_weight, results.d_bias)
        bias = None if heads.bias is None else heads.bias.dtype
        ctx.dtypes = rows.hidden.dtype, heads.weight.dtype, bias
        ctx.trained = settings.label_gradient, settings.kd_gradient
        label, kd, correct = results[:3] if per_row else (x.sum() for x in results[:3])
        known = [x for x, trained in zip((label, kd), ctx.trained, strict=True) if not trained]
        ctx.mark_non_differentiable(correct, *known)
        return label, kd, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        incoming = [grad for grad, trained in zip(grads, ctx.trained, strict=False) if trained]
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        result: list[Tensor | None] = [None] * (1 + _TENSORS + len(LossSettings._fields))
        for at, made, dtype in (
            (0, d_hidden, hidden_dtype),
            (_ROWS, d_weight, weight_dtype),
            (_ROWS + 1, d_bias, bias_dtype),
        ):
            if ctx.needs_input_grad[1 + at] and incoming:
                result[1 + at] = _weighed(made, incoming).to(dtype)
        return tuple(result)


def _weighed(terms: Tensor, incoming: list[Tensor]) -> Tensor:
    """The terms' gradients, each times what comes in for it, added up."""
    factors = [g[:, None] if g.dim() else g for g in incoming]
    total = terms[0] * factors[0]
    return total if len(incoming) == 1 else total.addcmul_(terms[1], factors[1].to(total.dtype))


class LinearLosses(NamedTuple):
    """Results of `linear_cross_entropy_kd`.

    cross_entropy, kd: 0-d, or `[...]` with reduction `none`; differentiable, 0 without labels or
    without a teacher. correct: how many labels are the most probable token, or of each whether it
    is, as 0 or 1; of the rows whose cross-entropy counts, without gradient.
    """

    cross_entropy: Tensor
    kd: Tensor
    correct: Tensor


def default_chunk_rows(rows: int, vocabulary: int, *, terms: int, distils: bool) -> int:
    """Rows whose logits, and gradients or what makes them, fit into a quarter of `[rows,
    vocabulary]` and into `WORKSPACE_BYTES`; at least one, and what `WORKSPACE_LEAST_BYTES` hold."""
    copies = terms + 1 + distils  # in fp32
    quarter = rows * vocabulary // WORKSPACE_SHARE
    elements = max(min(quarter, WORKSPACE_BYTES // 4), WORKSPACE_LEAST_BYTES // 4)
    left = elements - _BLOCK_TENSORS * reference.BLOCK_ELEMENTS
    return max(1, min(rows, left // (copies * vocabulary)))


def scored(
    rows: LossRows, heads: Heads, settings: LossSettings, reduction: Reduction
) -> LinearLosses:
    """The losses of rows of any shape `[..., d]`; `settings` lacks what depends on them."""
    lead = rows.hidden.shape[:-1]
    count = math.prod(lead)
    trains = torch.is_grad_enabled() and (settings.label_gradient or settings.kd_gradient)
    hidden, teacher = rows.hidden, rows.teacher_hidden
    gradients = [
        trains and x is not None and x.requires_grad for x in (hidden, heads.weight, heads.bias)
    ]
    needed = any(gradients)
    label_gradient = needed and settings.label_gradient and rows.labels is not None
    kd_gradient = needed and settings.kd_gradient and teacher is not None
    chunk_rows = settings.chunk_rows or default_chunk_rows(
        *(count, settings.vocabulary),
        terms=label_gradient + kd_gradient,
        distils=teacher is not None,
    )
    settings = settings._replace(
        label_gradient=label_gradient,
        kd_gradient=kd_gradient,
        chunk_rows=chunk_rows,
        **dict(zip(("needs_hidden", "needs_weight", "needs_bias"), gradients, strict=True)),
        dtype=autocast_dtype(hidden),
    )
    flat = LossRows(
        hidden=hidden.reshape(count, hidden.shape[-1]),
        labels=None if rows.labels is None else rows.labels.reshape(count).long(),
        label_weights=_flat(rows.label_weights, count),
        teacher_hidden=(
            None if teacher is None else teacher.detach().reshape(count, teacher.shape[-1])
        ),
        kd_weights=_flat(rows.kd_weights, count),
    )
    heads = heads._replace(
        teacher_weight=_detached(heads.teacher_weight), teacher_bias=_detached(heads.teacher_bias)
    )
    results = _LinearLosses.apply(reduction == "none", *flat, *heads, *settings)
    if reduction == "none":
        return LinearLosses(*(x.reshape(lead) for x in results))
    if reduction == "sum":
        return LinearLosses(*results)
    counts = [(factor != 0).sum().clamp(min=1) for factor in reference.row_factors(flat)]
    return LinearLosses(results[0] / counts[0], results[1] / counts[1], results[2])


def _flat(weights: Tensor | None, count: int) -> Tensor | None:
    return None if weights is None else weights.detach().reshape(count)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
