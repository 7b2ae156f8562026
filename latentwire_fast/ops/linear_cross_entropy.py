"""Cross-entropy and distillation KL from one pass over the head."""

from __future__ import annotations

from torch import Tensor

from latentwire_fast.ops.dispatch import check_positive
from latentwire_fast.ops.distillation import Reduction
from latentwire_fast.ops.linear_checks import (
    check_heads,
    check_labels,
    check_reduction,
    check_settings,
    check_weights,
)
from latentwire_fast.ops.linear_losses import UNKNOWN, LinearLosses, scored
from latentwire_fast.reference import Heads, LossRows, LossSettings


def linear_cross_entropy_kd(
    hidden: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    label_weights: Tensor | None = None,
    kd_weights: Tensor | None = None,
    vocabulary: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    tau: float = 1.0,
    cross_entropy_gradient: bool = True,
    kd_gradient: bool = True,
    chunk_rows: int | None = None,
    reduction: Reduction = "sum",
) -> LinearLosses:
    """Cross-entropy of labels and distillation KL to a teacher, from one pass over the head.

    The logits `hidden @ weight.T + bias` are made for some rows at a time, with both gradients:
    `[N, V]` is never held. Each of the two losses has its own gradient, to `hidden`, and to
    `weight` and `bias` if they require one: weigh and add them as you like. `kd_kl` and
    `linear_kd_kl` describe the KL.

    Under `torch.autocast` the products are those of its dtype; sums, softmax and losses stay fp32,
    and so does the difference of the two models' hidden states.

    Args:
        hidden: `[..., d]`, the student's hidden states before the head.
        labels: `[...]` int64; a row whose label is below 0 has none. One beyond the vocabulary
        makes the loss NaN. None: no cross-entropy.
        weight: `[V, d]`, the head; bias: `[V]`.
        teacher_hidden: `[..., d]`, or `[..., d_t]` with its own `teacher_weight` `[V_t, d_t]` and
        `teacher_bias` `[V_t]`. None: no distillation.
        label_weights, kd_weights: `[...]`, bool or float, what a row's two losses count; None: 1.
        Rows of 0 may hold anything.
        vocabulary: how many of the head's rows are tokens, the first; the others are masked, in
        student and teacher. None: all.
        scale, softcap: a logit z is `softcap * tanh(scale * z / softcap)`; softcap None: `scale *
        z`.
        label_smoothing: share of each label that is spread evenly over all tokens.
        tau: temperature of the KL, which is multiplied by its square.
        cross_entropy_gradient, kd_gradient: False for a loss that is only to be known.
        chunk_rows: rows whose logits are held at a time. None: as many as a quarter of `[N, V]` and
        512 MiB hold, with their gradients; but not fewer than 32 MiB hold.
        reduction: `sum` over rows, `mean` over those that count (weight not 0), or `none`.

    Returns:
        The losses, in fp32 (fp64 for fp64 hidden states), and how many labels are the most probable
        token.

    Raises:
        ConfigError: a setting that is none; reduction `none` with a trained head.
        KernelError: shapes or dtypes that do not fit.
    """
    op = "linear_cross_entropy_kd"
    heads = Heads(weight, bias, teacher_weight, teacher_bias)
    check_heads(op, "hidden", hidden, teacher_hidden, heads, vocabulary)
    check_labels(op, labels, hidden)
    check_weights(op, "label_weights", label_weights, hidden)
    check_weights(op, "kd_weights", kd_weights, hidden)
    check_positive(op, "tau", tau)
    check_settings(
        *(op,),
        chunk_rows=chunk_rows,
        softcap=softcap,
        scale=scale,
        label_smoothing=label_smoothing,
    )
    check_reduction(op, reduction, heads)
    settings = LossSettings(
        *(float(tau), float(scale), float(softcap or 0.0), float(label_smoothing)),
        vocabulary=weight.shape[0] if vocabulary is None else vocabulary,
        chunk_rows=chunk_rows or 0,
        label_gradient=cross_entropy_gradient,
        kd_gradient=kd_gradient,
        **UNKNOWN,
    )
    rows = LossRows(hidden, labels, label_weights, teacher_hidden, kd_weights)
    return scored(rows, heads, settings, reduction)
