"""K3 against eager torch, torch.compile and Liger-Kernel: KL on logits, and through the head.

pytest bench/bench_distill.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, DTYPE, measure, shapes
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast import ops

TAU = 2.0
# (N, d, V)
SHAPES = shapes(
    [(1024, 4096, 128_256), (4096, 4096, 128_256), (2048, 3584, 152_064)], [(8, 32, 999)]
)


def eager_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What a user writes, with fp32 softmaxes."""
    log_q = torch.log_softmax(student.float() / TAU, -1)
    log_p = torch.log_softmax(teacher.float() / TAU, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TAU**2


def liger_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger-Kernel's, with the log-softmaxes that it leaves to its caller."""
    loss = pytest.importorskip("liger_kernel.transformers").LigerKLDIVLoss(
        reduction="batchmean", log_target=True
    )
    log_q = torch.log_softmax(student.float() / TAU, -1)
    return loss(log_q, torch.log_softmax(teacher.float() / TAU, -1)) * TAU**2


def liger_linear(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Liger-Kernel's fused linear JSD at beta 0, which is the forward KL; the head is frozen."""
    jsd = pytest.importorskip("liger_kernel.transformers").LigerFusedLinearJSD(
        jsd_beta=0.0, temperature=TAU
    )
    return jsd(student, weight, teacher, weight) * TAU**2


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of student and teacher, and the head."""
    rows, width, vocabulary = shape
    teacher = torch.randn(rows, width, device=DEVICE)
    student = teacher + 0.1 * torch.randn(rows, width, device=DEVICE)
    weight = torch.randn(vocabulary, width, device=DEVICE) * width**-0.5
    return student.to(DTYPE), teacher.to(DTYPE), weight.to(DTYPE)


def gate(call: Callable[[], Tensor], truth: Tensor) -> float:
    """Relative error of the loss."""
    return ((call().detach().double().cpu() - truth) / truth).abs().item()


def truth_of(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """fp64, row by row so that it fits."""
    head, losses = weight.double(), []
    for s, t in zip(student.split(64), teacher.split(64), strict=True):
        log_q = torch.log_softmax(s.double() @ head.T / TAU, -1)
        log_p = torch.log_softmax(t.double() @ head.T / TAU, -1)
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(losses).mean().cpu() * TAU**2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", ["ours", "eager", "compile", "liger"])
def test_kd_kl(benchmark: Any, row: str, shape: tuple[int, int, int]) -> None:
    if row in {"compile", "liger"} and DEVICE == "cpu":
        pytest.skip("compared on a GPU only")
    hidden, other, weight = inputs(shape)
    student, teacher = hidden @ weight.T, other @ weight.T
    truth = torch.stack(
        [
            eager_kl(s[None].double(), t[None].double()).double()
            for s, t in zip(student, teacher, strict=True)
        ]
    ).mean()
    student.requires_grad_()
    losses: dict[str, Callable[..., Tensor]] = {
        "ours": lambda s, t: ops.kd_kl(s, t, tau=TAU),
        "eager": eager_kl,
        "compile": eager_kl,
        "liger": liger_kl,
    }
    loss_of = torch.compile(losses[row]) if row == "compile" else losses[row]

    def call() -> Tensor:
        loss = loss_of(student, teacher)
        torch.autograd.grad(loss, student)
        return loss

    measure(
        benchmark,
        call,
        error=gate(call, truth.cpu()),
        allowed=1e-3,
        traffic=5 * student.numel() * DTYPE.itemsize,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", ["ours", "eager", "compile", "liger"])
def test_linear_kd_kl(benchmark: Any, row: str, shape: tuple[int, int, int]) -> None:
    if row in {"compile", "liger"} and DEVICE == "cpu":
        pytest.skip("compared on a GPU only")
    student, teacher, weight = inputs(shape)
    truth = truth_of(student, teacher, weight)
    student.requires_grad_()

    def through_logits(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return eager_kl(s @ w.T, t @ w.T)

    losses: dict[str, Callable[..., Tensor]] = {
        "ours": lambda s, t, w: ops.linear_kd_kl(s, t, w, tau=TAU),
        "eager": through_logits,
        "compile": through_logits,
        "liger": liger_linear,
    }
    loss_of = torch.compile(losses[row]) if row == "compile" else losses[row]

    def call() -> Tensor:
        loss = loss_of(student, teacher, weight)
        torch.autograd.grad(loss, student)
        return loss

    rows, width, vocabulary = shape
    measure(
        benchmark,
        call,
        error=gate(call, truth),
        allowed=2e-2,
        traffic=8 * rows * vocabulary * DTYPE.itemsize,
        flops=6 * rows * vocabulary * width,
    )
