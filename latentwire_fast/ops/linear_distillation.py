"""Distillation KL on hidden states through the head, without ever holding `[N, V]`."""

from __future__ import annotations

from torch import Tensor

from latentwire_fast.ops.distillation import Reduction, check_distillation
from latentwire_fast.ops.linear_checks import check_heads, check_reduction, check_settings
from latentwire_fast.ops.linear_losses import UNKNOWN, scored
from latentwire_fast.reference import Heads, LossRows, LossSettings


def linear_kd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    tau: float = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocabulary: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`kd_kl` of two models' logits, from the hidden states before their heads: never holds `[N,
    V]`.

    Gradients go to `student_hidden`, and to `weight` and `bias` if they require one; they are made
    in the forward call. Memory beyond inputs and gradients is 8 bytes per `chunk_rows * V`, and
    with a half precision head 2 more on a GPU, where hidden states and heads that are not all of
    one dtype are multiplied in fp32, with a copy of the head.

    Args:
        student_hidden: `[..., d]`; teacher_hidden: `[..., d]`, or `[..., d_t]` with its own head.
        weight: `[V, d]`, the student's head (and the teacher's, without `teacher_weight`).
        teacher_weight: `[V_t, d_t]`, V_t >= V: the first V tokens are the student's, and only they
            count. tau, mask, reduction: as in `kd_kl`.
        chunk_rows, softcap, bias, teacher_bias, vocabulary, scale: as in `linear_cross_entropy_kd`.

    Returns:
        The loss in fp32 (fp64 for fp64 hidden states).

    Raises:
        ConfigError: tau, reduction, chunk_rows or softcap; reduction `none` with a trained head.
        KernelError: shapes or dtypes that do not fit.
    """
    op = "linear_kd_kl"
    heads = Heads(weight, bias, teacher_weight, teacher_bias)
    check_heads(op, "student_hidden", student_hidden, teacher_hidden, heads, vocabulary)
    check_distillation(op, tau, mask, student_hidden, reduction)
    check_settings(op, chunk_rows=chunk_rows, softcap=softcap, scale=scale)
    check_reduction(op, reduction, heads)
    settings = LossSettings(
        *(float(tau), float(scale), float(softcap or 0.0), 0.0),
        vocabulary=weight.shape[0] if vocabulary is None else vocabulary,
        chunk_rows=chunk_rows or 0,
        label_gradient=False,
        kd_gradient=True,
        **UNKNOWN,
    )
    rows = LossRows(student_hidden, None, None, teacher_hidden, mask)
    return scored(rows, heads, settings, reduction).kd
