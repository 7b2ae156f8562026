"""The cross-entropy through the head (K3 of docs/kernels.md) against eager torch, torch.compile and
Liger-Kernel's fused linear cross-entropy.

pytest bench/kernels/bench_cross_entropy.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.bench_distill import (
    GRADIENT_LIMIT,
    HIDDEN,
    LOSS_LIMIT,
    ORACLE_ROWS,
    SMALL_HIDDEN,
    errors,
    rows_of,
)
from bench.kernels.ceilings import Stage
from bench.kernels.clocks import Inputs
from bench.kernels.harness import DEVICE, Case, Forward, dtype_of, grid, library, report_row
from bench.kernels.head_chunks import chunks
from latentwire_fast import ops

# Fewer than the KL's: eager torch needs half as much memory here, of which ours may take an eighth.
CHUNK_ROWS = 512


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Through the logits, with an fp32 softmax."""
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    losses = ops.linear_cross_entropy_kd(
        *(hidden, labels, weight), chunk_rows=CHUNK_ROWS, reduction="mean"
    )
    return losses.cross_entropy


def liger() -> Forward:
    """Liger-Kernel's, whose head is frozen as ours is."""
    loss = library("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss(weight, hidden, labels)

    return forward


def exact(inputs: Inputs) -> list[Tensor]:
    """fp64 on the same rounded inputs, a few rows at a time: the loss, the gradient."""
    hidden, weight, labels = (t.detach() for t in inputs)
    head = weight.double()
    losses, grads = [], []
    for h, label in zip(hidden.split(ORACLE_ROWS), labels.split(ORACLE_ROWS), strict=True):
        log_q = torch.log_softmax(h.double() @ head.T, -1)
        losses.append(F.nll_loss(log_q, label, reduction="sum"))
        grad = log_q.exp_()
        grad[torch.arange(len(h), device=grad.device), label] -= 1
        grads.append((grad @ head).float())
    return [torch.stack(losses).sum() / len(hidden), torch.cat(grads) / len(hidden)]


def case_of(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """Of random labels: the loss is about log V, as before any training."""
    rows, width, vocabulary = shape

    def inputs() -> Inputs:
        hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
        weight = torch.randn(vocabulary, width, device=DEVICE) * width**-0.5
        return hidden, weight.to(dtype), torch.randint(vocabulary, (rows,), device=DEVICE)

    element = dtype.itemsize
    return Case(
        *("K3", "cross-entropy through the head, forward+backward", shape, dtype),
        # Hidden states and head in, the gradient out; what is between may stay on chip.
        work=Stage((vocabulary + 2 * rows) * width * element, 4 * rows * vocabulary * width),
        design=chunk_stages(shape, element),
        inputs=inputs,
        truth=exact,
        errors=errors,
        rows=rows_of(
            *(ours, eager, liger, {"loss": LOSS_LIMIT, "gradient": GRADIENT_LIMIT}), backward=True
        ),
    )


def chunk_stages(shape: tuple[int, int, int], element: int) -> tuple[Stage, ...]:
    """Launches of `linear_cross_entropy_kd` without a teacher.

    Per chunk: rows that count, multiply, statistics and gradient (two walks), multiply back, the
    rows' factors.
    """
    stages: list[Stage] = []
    for c in chunks(shape, element, chunk_rows=CHUNK_ROWS):
        stages.append(Stage(2 * c.hidden, launches=5))
        stages.append(Stage(c.hidden + c.head + c.logits_fp32, c.product))
        stages.append(Stage(2 * c.logits_fp32 + c.logits))
        stages.append(Stage(c.logits + c.head + c.hidden_fp32, c.product))
        stages.append(Stage(8 * c.hidden_fp32, launches=4))
    return tuple(stages)


def cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    return [case_of(shape, dtype_of(gpu)) for shape in (HIDDEN if gpu else SMALL_HIDDEN)]


@pytest.mark.parametrize(**grid(cases()))
def test_cross_entropy(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
