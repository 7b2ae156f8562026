"""What the losses through the head demand of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from latentwire_fast.errors import ConfigError, KernelError
from latentwire_fast.ops.dispatch import (
    check_float,
    check_positive,
    check_shape,
    check_tensor,
    is_number,
    one_of,
)
from latentwire_fast.ops.distillation import REDUCTIONS, check_vocabulary
from latentwire_fast.reference import Heads


def check_heads(
    op: str, name: str, hidden: Tensor, teacher: Tensor | None, heads: Heads, vocabulary: int | None
) -> None:
    """Raise unless hidden states and heads fit.

    Args:
        name: what the op calls `hidden`.
    """
    weight, other = heads.weight, heads.teacher_weight
    check_float(op, name, hidden, dims=1)
    if teacher is not None:
        check_float(op, "teacher_hidden", teacher, dims=1)
    check_float(op, "weight", weight, dims=2)
    check_shape(op, "weight", weight, (weight.shape[0], hidden.shape[-1]), hidden)
    check_vocabulary(op, "weight", weight, 0)
    if (weight.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise KernelError(
            f"{op}: {name} is {hidden.dtype} and weight {weight.dtype}; expected both in "
            "torch.float64, or neither"
        )
    _check_bias(op, "bias", heads.bias, weight, hidden)
    known = _checked_vocabulary(op, weight, vocabulary)
    if teacher is None:
        return
    if other is None:
        if heads.teacher_bias is not None:
            raise KernelError(
                f"{op}: teacher_bias without teacher_weight; give both, or leave the bias away: a "
                "teacher with the student's head has its bias too"
            )
        check_shape(op, "teacher_hidden", teacher, tuple(hidden.shape), hidden)
        return
    check_float(op, "teacher_weight", other, dims=2)
    width = teacher.shape[-1]
    check_shape(op, "teacher_hidden", teacher, (*hidden.shape[:-1], width), hidden)
    check_shape(op, "teacher_weight", other, (other.shape[0], width), hidden)
    _check_bias(op, "teacher_bias", heads.teacher_bias, other, hidden)
    if other.shape[0] < known:
        raise KernelError(
            f"{op}: teacher_weight has {other.shape[0]} rows (tokens); expected at least "
            f"the student's {known}"
        )


def _check_bias(op: str, name: str, bias: Tensor | None, weight: Tensor, on: Tensor) -> None:
    if bias is not None:
        check_float(op, name, bias, dims=1)
        check_shape(op, name, bias, (weight.shape[0],), on)


def _checked_vocabulary(op: str, weight: Tensor, vocabulary: int | None) -> int:
    rows = weight.shape[0]
    if vocabulary is None:
        return rows
    is_count = isinstance(vocabulary, int) and not isinstance(vocabulary, bool)
    if not is_count or not 1 <= vocabulary <= rows:
        raise ConfigError(
            f"{op}: vocabulary is {vocabulary!r}; expected a number of tokens from 1 to the head's "
            f"{rows} rows, or None for all of them"
        )
    return vocabulary


def check_labels(op: str, labels: Tensor | None, hidden: Tensor) -> None:
    """Raise unless there is an integer for each row."""
    if labels is None:
        return
    check_tensor(op, "labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise KernelError(f"{op}: labels is {labels.dtype}; expected torch.int64")
    check_shape(op, "labels", labels, tuple(hidden.shape[:-1]), hidden)


def check_weights(op: str, name: str, weights: Tensor | None, hidden: Tensor) -> None:
    """Raise unless there is a number or a truth value for each row."""
    if weights is None:
        return
    check_tensor(op, name, weights)
    if weights.dtype != torch.bool:
        check_float(op, name, weights, dims=len(hidden.shape) - 1)
    check_shape(op, name, weights, tuple(hidden.shape[:-1]), hidden)


def check_settings(
    op: str, *, chunk_rows: object, softcap: object, scale: object, label_smoothing: object = 0.0
) -> None:
    """Raise unless these are what they stand for."""
    is_count = isinstance(chunk_rows, int) and not isinstance(chunk_rows, bool)
    if chunk_rows is not None and (not is_count or chunk_rows < 1):  # type: ignore[operator]
        raise ConfigError(f"{op}: chunk_rows is {chunk_rows!r}; expected an integer of at least 1")
    if softcap is not None:
        check_positive(op, "softcap", softcap, otherwise=", or None")
    check_positive(op, "scale", scale)
    if not (is_number(label_smoothing) and 0 <= label_smoothing < 1):  # type: ignore[operator]
        raise ConfigError(
            f"{op}: label_smoothing is {label_smoothing!r}; expected a number from 0 to below 1"
        )


def check_reduction(op: str, reduction: str, heads: Heads) -> None:
    """Raise unless the losses can be reduced so."""
    one_of(op, "reduction", reduction, REDUCTIONS)
    trained = [x for x in (heads.weight, heads.bias) if x is not None and x.requires_grad]
    if reduction == "none" and torch.is_grad_enabled() and trained:
        raise ConfigError(
            f"{op}: reduction 'none' cannot give the head's gradient; freeze weight and bias, or "
            "use 'mean'"
        )
