"""Cross-entropy and distillation KL on hidden states through the head, never `[N, V]` at a time.

Shapes: N rows (tokens), d width of the hidden states, V rows of the head, T trained terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentwire_fast.reference.distillation import kl_gradient, kl_statistics, row_blocks
from latentwire_fast.reference.precision import compute_dtype


class LossRows(NamedTuple):
    """What is scored.

    hidden: `[N, d]`; labels: `[N]` int64, below 0 where a row has none, or None without
    cross-entropy; teacher_hidden: `[N, d_t]`, or None without distillation. label_weights and
    kd_weights: `[N]`, bool or float, factors of a row's two losses; None: 1. Of a row whose factor
    is 0 the loss and its gradient are 0, whatever it holds.
    """

    hidden: Tensor
    labels: Tensor | None
    label_weights: Tensor | None
    teacher_hidden: Tensor | None
    kd_weights: Tensor | None


class Heads(NamedTuple):
    """weight: `[V, d]`, bias: `[V]`: of the student, and without `teacher_weight` the teacher's
    too; teacher_weight: `[V_t, d_t]`, teacher_bias: `[V_t]`."""

    weight: Tensor
    bias: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None


class LossSettings(NamedTuple):
    """tau: temperature of the KL. scale, softcap: a logit z is `softcap * tanh(scale * z /
    softcap)`; softcap 0: `scale * z`. smoothing: share of a label that is spread over all tokens.
    vocabulary: rows of the heads that are tokens, the first. chunk_rows: rows whose logits are held
    at a time. label_gradient, kd_gradient: which terms are trained; needs_hidden, needs_weight,
    needs_bias: what their gradients are wanted for. dtype: what the factors of the products are
    rounded to first, as autocast does; None for as they are.
    """

    tau: float
    scale: float
    softcap: float
    smoothing: float
    vocabulary: int
    chunk_rows: int
    label_gradient: bool
    kd_gradient: bool
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    dtype: torch.dtype | None


class LossResults(NamedTuple):
    """label_losses, kd_losses: `[N]`, times their factors; correct: `[N]`, 1 where the label is the
    most probable token. Gradients of the trained terms, cross-entropy first: d_hidden `[T, N, d]`,
    each row its own loss's; d_weight `[T, V, d]` and d_bias `[T, V]`, of the losses' sum. Empty
    where not needed."""

    label_losses: Tensor
    kd_losses: Tensor
    correct: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def result_shapes(rows: LossRows, heads: Heads, settings: LossSettings) -> list[tuple[int, ...]]:
    """Shapes of the results; all are of the dtype that `rows.hidden` is computed in."""
    n, (vocabulary, width) = rows.hidden.shape[0], heads.weight.shape
    terms = settings.label_gradient + settings.kd_gradient
    return [
        *[(n,)] * 3,
        (terms, n if settings.needs_hidden else 0, width),
        (terms, vocabulary if settings.needs_weight else 0, width),
        (terms, vocabulary if settings.needs_bias else 0),
    ]


def row_factors(rows: LossRows) -> tuple[Tensor, Tensor]:
    """Factors `[N]` of the rows' two losses: 0 where a term has none."""
    ones = rows.hidden.new_ones(rows.hidden.shape[0], dtype=compute_dtype(rows.hidden))
    labels, kd = (
        w if w is None else w.to(ones.dtype) for w in (rows.label_weights, rows.kd_weights)
    )
    kd = ones if kd is None else kd
    if rows.teacher_hidden is None:
        kd = torch.zeros_like(ones)
    if rows.labels is None:
        return torch.zeros_like(ones), kd
    return (ones if labels is None else labels).masked_fill(rows.labels < 0, 0.0), kd


def linear_losses(rows: LossRows, heads: Heads, settings: LossSettings) -> LossResults:
    """Cross-entropy of `labels`, and `kd_kl` to the teacher, of the logits `hidden @ weight.T`.

    With one head for both, the difference of the logits is the head applied to the difference of
    the hidden states: rounding then is relative to the difference, not to the logits. The labels'
    loss is the same with a teacher and without. A softcap c turns the difference into
    `c*tanh(delta/c)*(1 - tanh(t/c)*tanh(s/c))`. Holds one `[chunk_rows, V]` buffer, with a teacher
    two, and the head once more in fp32 if it is in a half precision.

    A token whose student logit is -inf (by the bias) is none: it leaves both distributions, and the
    share that smoothing spreads. A label beyond the vocabulary makes its loss NaN.
    """
    c = compute_dtype(rows.hidden)
    shapes = result_shapes(rows, heads, settings)
    results = LossResults(*(rows.hidden.new_zeros(shape, dtype=c) for shape in shapes))
    head = _Products(heads, settings, c)
    factors = row_factors(rows)
    live = ((factors[0] != 0) | (factors[1] != 0)).nonzero().squeeze(1)
    for index in live.split(settings.chunk_rows):
        part = LossRows(*(None if x is None else x[index] for x in rows))  # type: ignore[arg-type]
        _chunk(part, index, (factors[0][index], factors[1][index]), head, results)
    return results


class _Products:
    """The heads, as they are multiplied with."""

    def __init__(self, heads: Heads, settings: LossSettings, c: torch.dtype) -> None:
        self.settings, self.c = settings, c
        known = settings.vocabulary
        self.weight = self.operand(heads.weight[:known])
        self.bias = None if heads.bias is None else heads.bias[:known].to(c)
        self.teacher_weight, self.teacher_bias = self.weight, self.bias
        self.shared = heads.teacher_weight is None
        if heads.teacher_weight is not None:
            self.teacher_weight = self.operand(heads.teacher_weight[:known])
            other = heads.teacher_bias
            self.teacher_bias = None if other is None else other[:known].to(c)

    def operand(self, x: Tensor) -> Tensor:
        """A factor of a product, rounded as the settings ask."""
        return x.to(self.settings.dtype or x.dtype).to(self.c)

    def student(self, hidden: Tensor) -> Tensor:
        """Logits before the cap."""
        return self._logits(self.operand(hidden), self.weight, self.bias)

    def teacher(self, hidden: Tensor) -> Tensor:
        """Logits before the cap."""
        return self._logits(self.operand(hidden), self.teacher_weight, self.teacher_bias)

    def difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of two models with one head: its bias is in both logits. Never rounded: a small
        difference has to stay exact."""
        return self._logits(student - teacher, self.weight, None)

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = hidden @ weight.T
        if bias is not None:
            logits += bias
        return logits if self.settings.scale == 1.0 else logits.mul_(self.settings.scale)


def _chunk(
    part: LossRows,
    index: Tensor,
    factors: tuple[Tensor, Tensor],
    head: _Products,
    results: LossResults,
) -> None:
    """Fill in the results of the rows at `index`; `part` and `factors` are theirs."""
    settings, student = head.settings, part.hidden.to(head.c)
    s, other = head.student(student), None
    if part.teacher_hidden is not None:
        # A row that has no teacher may hold anything in its place.
        instead = student if head.shared else torch.zeros_like(part.teacher_hidden, dtype=head.c)
        teacher = torch.where(factors[1][:, None] != 0, part.teacher_hidden.to(head.c), instead)
        other = head.difference(student, teacher) if head.shared else head.teacher(teacher)
    for block in row_blocks(s):
        rows, logits = index[block], _Logits(s[block], _at(other, block), head)
        label_grad = kd_grad = None
        if part.labels is not None:
            loss, correct, label_grad = logits.cross_entropy(part.labels[block])
            results.label_losses[rows] = _weighted(loss, factors[0][block])
            results.correct[rows] = _weighted(correct, (factors[0][block] != 0).to(head.c))
        if other is not None:
            loss, kd_grad = logits.kl()
            results.kd_losses[rows] = _weighted(loss, factors[1][block])
        # The logits are done with: the gradients take their place.
        if label_grad is not None:
            s[block] = label_grad
        if kd_grad is not None and other is not None:
            other[block] = kd_grad
    trained = [(s, factors[0])] if settings.label_gradient else []
    trained += [(other, factors[1])] if settings.kd_gradient and other is not None else []
    for term, (grad, factor) in enumerate(trained):
        _add_gradients(term, grad, factor * settings.scale, student, index, head, results)


def _at(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _weighted(values: Tensor, factors: Tensor) -> Tensor:
    return (values * factors).masked_fill(factors == 0, 0.0)


def _add_gradients(
    term: int,
    grad: Tensor,
    factor: Tensor,
    student: Tensor,
    index: Tensor,
    head: _Products,
    results: LossResults,
) -> None:
    """From the gradient of a term's logits `[R, vocabulary]`, whose rows count `factor` times."""
    settings, known = head.settings, head.settings.vocabulary
    if settings.needs_hidden:
        results.d_hidden[term, index] = _weighted(grad @ head.weight, factor[:, None])
    if settings.needs_weight:
        results.d_weight[term, :known].addmm_(grad.T, student * factor[:, None])
    if settings.needs_bias:
        results.d_bias[term, :known].addmv_(grad.T, factor)


class _Logits:
    """Some rows' logits as they are compared, capped: the student's `s`, the teacher's `t`, and
    `delta`, s - t without cancellation."""

    def __init__(self, s: Tensor, other: Tensor | None, head: _Products) -> None:
        """Args: s: the student's; other: their difference to the teacher's, if the two share a
        head, else the teacher's."""
        self.settings, self.s = head.settings, s
        self.slope: Tensor | None = None  # of the cap
        cap = self.settings.softcap
        if other is not None:
            self.t, self.delta = (s - other, other) if head.shared else (other, s - other)
            if head.bias is not None:
                self.t = self.t.masked_fill(s == -torch.inf, -torch.inf)
        if cap:
            bent = torch.tanh(self.s / cap)
            self.s, self.slope = cap * bent, 1 - bent.square()
            if other is not None:
                t_bent = torch.tanh(self.t / cap)
                self.t = cap * t_bent
                self.delta = cap * torch.tanh(self.delta / cap) * (1 - t_bent * bent)

    def cross_entropy(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses, whether the label is the most probable token, gradient if it is trained."""
        smoothing, (_, vocabulary) = self.settings.smoothing, self.s.shape
        at = labels.clamp(0, vocabulary - 1)[:, None]
        gold = self.s.gather(1, at).masked_fill(labels[:, None] >= vocabulary, torch.nan)[:, 0]
        log_z = torch.logsumexp(self.s, -1)
        losses, correct = log_z - gold, self.s.argmax(-1) == labels
        live = self.s > -torch.inf
        if smoothing:
            mean = torch.where(live, self.s, 0.0).sum(-1) / live.sum(-1)
            losses = (1 - smoothing) * losses + smoothing * (log_z - mean)
        if not self.settings.label_gradient:
            return losses, correct, None
        grad = torch.exp(self.s - log_z[:, None])
        if smoothing:
            grad -= live.to(grad.dtype).mul_(smoothing / live.sum(-1, keepdim=True).to(grad.dtype))
        grad.scatter_add_(1, at, grad.new_full((), smoothing - 1).expand(at.shape))
        return losses, correct, self._uncapped(grad)

    def kl(self) -> tuple[Tensor, Tensor | None]:
        """Losses, and their gradient if it is trained."""
        tau = self.settings.tau
        statistics = kl_statistics(self.t, self.delta, self.s, tau)
        losses = statistics[2] * tau**2
        if not self.settings.kd_gradient:
            return losses, None
        return losses, self._uncapped(kl_gradient(self.t, self.delta, self.s, statistics, tau))

    def _uncapped(self, grad: Tensor) -> Tensor:
        return grad if self.slope is None else grad.mul_(self.slope)
