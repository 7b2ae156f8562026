"""The distillation KL (K3 of docs/kernels.md) against eager torch, torch.compile and
Liger-Kernel: KL on logits, and through the head.

pytest bench/kernels/bench_distill.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.ceilings import Stage
from bench.kernels.clocks import Call, Inputs
from bench.kernels.harness import (
    AUTOTUNED,
    DEVICE,
    Case,
    Forward,
    Row,
    compiled,
    distance,
    dtype_of,
    grid,
    library,
    report_row,
)
from bench.kernels.head_chunks import chunks
from bench.kernels.records import Errors
from latentwire_fast import ops

TAU = 2.0
# Ours, relative to fp64's of the same rounded logits or hidden states.
LOSS_LIMIT, GRADIENT_LIMIT = 5e-5, 2e-2
# Eager torch itself must be this close for its row to count.
EAGER_LIMIT = 5e-2
CHUNK_ROWS = 1024
# Rows of the fp64 oracle at a time: a gigabyte of logits.
ORACLE_ROWS = 512
# (N, V), and (N, d, V)
LOGITS = [(1024, 128_256), (4096, 128_256), (2048, 152_064)]
HIDDEN = [(1024, 4096, 128_256), (4096, 4096, 128_256), (2048, 3584, 152_064)]
SMALL_LOGITS, SMALL_HIDDEN = [(8, 999)], [(8, 32, 999)]


def eager_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The plain torch version, with fp32 softmaxes."""
    log_q = torch.log_softmax(student.float() / TAU, -1)
    log_p = torch.log_softmax(teacher.float() / TAU, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TAU**2


def eager_linear(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Through the logits."""
    return eager_kl(student @ weight.T, teacher @ weight.T)


def liger_kl() -> Forward:
    """Liger-Kernel's, with the log-softmaxes that it leaves to its caller."""
    loss = library("liger_kernel.transformers").LigerKLDIVLoss(
        reduction="batchmean", log_target=True
    )

    def forward(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = torch.log_softmax(student.float() / TAU, -1)
        return loss(log_q, torch.log_softmax(teacher.float() / TAU, -1)) * TAU**2

    return forward


def liger_linear() -> Forward:
    """Liger-Kernel's fused linear JSD at beta 0, which is the forward KL; the head is frozen."""
    jsd = library("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0, temperature=TAU)

    def forward(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return jsd(student, weight, teacher, weight, None) * TAU**2  # None: no labels to ignore

    return forward


def step(forward: Forward, *, backward: bool) -> Call:
    """The loss, and with `backward` the student's gradient."""

    def call(inputs: Inputs) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [forward(*inputs)]
        loss = forward(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs[0])]

    return call


class InPlace:
    """`kd_kl` whose gradient takes the place of the logits: those are a copy, new for each call."""

    def before(self, inputs: Inputs) -> None:
        self._logits = inputs[0] * 1

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        loss = ops.kd_kl(self._logits, inputs[1], tau=TAU, in_place=True)
        return [loss.detach(), *torch.autograd.grad(loss, self._logits)]


def exact(inputs: Inputs, *, backward: bool) -> list[Tensor]:
    """fp64 on the same rounded inputs, a few rows at a time: the loss, the student's gradient."""
    student, teacher, *head = (t.detach() for t in inputs)
    weight = head[0].double().T if head else None
    losses, grads = [], []
    for s, t in zip(student.split(ORACLE_ROWS), teacher.split(ORACLE_ROWS), strict=True):
        s, t = s.double(), t.double()
        if weight is not None:
            s, t = s @ weight, t @ weight
        log_q, log_p = torch.log_softmax(s / TAU, -1), torch.log_softmax(t / TAU, -1)
        losses.append((log_p.exp() * (log_p - log_q)).sum() * TAU**2)
        if backward:
            grad = (log_q.exp() - log_p.exp()) * TAU
            grads.append((grad if weight is None else grad @ weight.T).float())
    rows = student.shape[0]
    found = [torch.stack(losses).sum() / rows]
    return [*found, torch.cat(grads) / rows] if backward else found


def errors(found: list[Tensor], inputs: Inputs, truth: list[Tensor]) -> Errors:
    result = {"loss": distance(found[0], truth[0])}
    if len(found) > 1:
        result["gradient"] = distance(found[1], truth[1])
    return result


def rows_of(
    ours: Forward,
    plain: Forward,
    liger: Callable[[], Forward] | None,
    ours_limits: Errors,
    *,
    backward: bool,
) -> dict[str, Row]:
    def row(make: Callable[[], Forward], limits: Errors) -> Row:
        return Row(lambda: step(make(), backward=backward), limits)

    rows = {
        "ours": row(lambda: ours, ours_limits),
        "eager": row(lambda: plain, {"loss": EAGER_LIMIT, "gradient": EAGER_LIMIT}),
        "compile": row(lambda: compiled(plain), {}),
        AUTOTUNED: row(lambda: compiled(plain, mode=AUTOTUNED), {}),
    }
    return rows if liger is None else {**rows, "liger": row(liger, {})}


def logits_case(shape: tuple[int, int], dtype: torch.dtype, *, backward: bool) -> Case:
    """Divergence about 0.5: bf16's rounding of the logits is small against it, for every row."""

    def inputs() -> Inputs:
        teacher = 3 * torch.randn(shape, device=DEVICE)
        student = (teacher + torch.randn(shape, device=DEVICE)).to(dtype)
        return student.requires_grad_(backward), teacher.to(dtype)

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return ops.kd_kl(student, teacher, tau=TAU)

    rows = rows_of(ours, eager_kl, liger_kl, {"loss": LOSS_LIMIT}, backward=backward)
    if backward:
        rows["ours in place"] = Row(InPlace, {"loss": LOSS_LIMIT})
    size = shape[0] * shape[1] * dtype.itemsize
    return Case(
        *("K3", f"KL of logits, {'forward+backward' if backward else 'forward'}", shape, dtype),
        # The gradient takes a second walk over the row. Not all of it is still on chip by then: the
        # design counts that as read again, the floor does not.
        work=Stage(3 * size) if backward else Stage(2 * size),
        design=(Stage(5 * size), Stage(0.0, launches=5)) if backward else (Stage(2 * size),),
        inputs=inputs,
        truth=lambda inputs: exact(inputs, backward=backward),
        errors=errors,
        rows=rows,
    )


def hidden_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a student and its teacher, and the head that both use."""
    rows, width, vocabulary = shape
    teacher = torch.randn(rows, width, device=DEVICE)
    student = (teacher + torch.randn(rows, width, device=DEVICE)).to(dtype)
    weight = torch.randn(vocabulary, width, device=DEVICE) * width**-0.5
    return student.requires_grad_(backward), teacher.to(dtype), weight.to(dtype)


def hidden_case(shape: tuple[int, int, int], dtype: torch.dtype, *, backward: bool) -> Case:
    rows, width, vocabulary = shape

    def ours(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_kd_kl(student, teacher, weight, tau=TAU, chunk_rows=CHUNK_ROWS)

    products = 3 if backward else 2
    flops = products * 2 * rows * vocabulary * width
    head = vocabulary * width * dtype.itemsize
    hidden = rows * width * dtype.itemsize
    return Case(
        *("K3", f"KL through the head, {'forward+backward' if backward else 'forward'}"),
        *(shape, dtype),
        # Hidden states and head in, the gradient out; what is between may stay on chip.
        work=Stage(head + products * hidden, flops),
        design=chunk_stages(shape, dtype.itemsize),
        inputs=lambda: hidden_inputs(shape, dtype, backward=backward),
        truth=lambda inputs: exact(inputs, backward=backward),
        errors=errors,
        # Liger's makes its gradient in any forward call: alone, that would count against it.
        rows=rows_of(
            *(ours, eager_linear, liger_linear if backward else None),
            {"loss": LOSS_LIMIT, "gradient": GRADIENT_LIMIT},
            backward=backward,
        ),
    )


def chunk_stages(shape: tuple[int, int, int], element: int) -> tuple[Stage, ...]:
    """Launches of `linear_kd_kl` with one half precision head, which are the same without backward.

    Per chunk: difference and stack, multiply, statistics and gradient, multiply back, what the
    difference lost by rounding.
    """
    stages: list[Stage] = []
    for c in chunks(shape, element, chunk_rows=CHUNK_ROWS):
        stages.append(Stage(8 * c.hidden + 6 * c.hidden_fp32, launches=5))
        stages.append(Stage(2 * c.hidden + c.head + 2 * c.logits_fp32, 2 * c.product))
        stages.append(Stage(4 * c.logits_fp32 + c.logits))
        stages.append(Stage(c.logits + c.head + c.hidden_fp32, c.product))
        stages.append(Stage(6 * c.hidden_fp32, launches=4))
    return tuple(stages)


def logits_cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """K3a; the targets' direction first."""
    shapes = LOGITS if gpu else SMALL_LOGITS
    return [logits_case(s, dtype_of(gpu), backward=b) for b in (True, False) for s in shapes]


def hidden_cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """K3b; likewise."""
    shapes = HIDDEN if gpu else SMALL_HIDDEN
    return [hidden_case(s, dtype_of(gpu), backward=b) for b in (True, False) for s in shapes]


@pytest.mark.parametrize(**grid([*logits_cases(), *hidden_cases()]))
def test_distill(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
