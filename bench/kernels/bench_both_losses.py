"""Cross-entropy and KL from one pass over the head (K3 of docs/kernels.md) against eager torch,
torch.compile, and Liger-Kernel's two losses, one after the other.

pytest bench/kernels/bench_both_losses.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import bench_cross_entropy, bench_distill
from bench.kernels.bench_distill import (
    GRADIENT_LIMIT,
    HIDDEN,
    LOSS_LIMIT,
    SMALL_HIDDEN,
    TAU,
    errors,
    rows_of,
)
from bench.kernels.ceilings import Stage
from bench.kernels.clocks import Inputs
from bench.kernels.harness import DEVICE, Case, Forward, dtype_of, grid, report_row
from bench.kernels.head_chunks import chunks
from latentwire_fast import ops

# As of the cross-entropy alone: ours may take an eighth of eager torch's memory.
CHUNK_ROWS = bench_cross_entropy.CHUNK_ROWS


def eager(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Through the logits of both models, the student's made once."""
    logits = student @ weight.T
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    return loss + bench_distill.eager_kl(logits, teacher @ weight.T)


def ours(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    losses = ops.linear_cross_entropy_kd(
        *(student, labels, weight),
        teacher_hidden=teacher,
        tau=TAU,
        chunk_rows=CHUNK_ROWS,
        reduction="mean",
    )
    return losses.cross_entropy + losses.kd


def liger() -> Forward:
    """Liger-Kernel has no operation for this pair: each of its losses goes over the head."""
    entropy, kd = bench_cross_entropy.liger(), bench_distill.liger_linear()

    def forward(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return entropy(student, weight, labels) + kd(student, teacher, weight)

    return forward


def exact(inputs: Inputs) -> list[Tensor]:
    """fp64 on the same rounded inputs: the sum of the losses, its gradient."""
    student, teacher, weight, labels = inputs
    terms = (
        bench_cross_entropy.exact((student, weight, labels)),
        bench_distill.exact((student, teacher, weight), backward=True),
    )
    return [a + b for a, b in zip(*terms, strict=True)]


def case_of(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    rows, width, vocabulary = shape

    def inputs() -> Inputs:
        models = bench_distill.hidden_inputs(shape, dtype, backward=True)
        return *models, torch.randint(vocabulary, (rows,), device=DEVICE)

    element = dtype.itemsize
    return Case(
        *("K3", "both losses through the head, forward+backward", shape, dtype),
        # Hidden states and head in, the gradient out. One product back: the gradients of the logits
        # may be added before it. Ours has two, so that the losses can be weighted afterwards.
        work=Stage((vocabulary + 3 * rows) * width * element, 6 * rows * vocabulary * width),
        design=chunk_stages(shape, element),
        inputs=inputs,
        truth=exact,
        errors=errors,
        rows=rows_of(
            *(ours, eager, liger, {"loss": LOSS_LIMIT, "gradient": GRADIENT_LIMIT}), backward=True
        ),
    )


def chunk_stages(shape: tuple[int, int, int], element: int) -> tuple[Stage, ...]:
    """Launches of `linear_cross_entropy_kd` with a teacher and one half precision head.

    Per chunk: difference and stack, multiply; statistics and gradient of each loss, which walk over
    both logits twice; two products back; what the difference lost by rounding, the rows' factors.
    """
    stages: list[Stage] = []
    for c in chunks(shape, element, chunk_rows=CHUNK_ROWS):
        stages.append(Stage(10 * c.hidden + 6 * c.hidden_fp32, launches=8))
        stages.append(Stage(2 * c.hidden + c.head + 2 * c.logits_fp32, 2 * c.product))
        stages += [Stage(4 * c.logits_fp32 + c.logits)] * 2
        stages += [Stage(c.logits + c.head + c.hidden_fp32, c.product)] * 2
        stages.append(Stage(14 * c.hidden_fp32, launches=8))
    return tuple(stages)


def cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """One of the shapes: the cross-entropy and the KL alone have all of them."""
    return [case_of(shape, dtype_of(gpu)) for shape in (HIDDEN[1:2] if gpu else SMALL_HIDDEN)]


@pytest.mark.parametrize(**grid(cases()))
def test_both_losses(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
