"""The distillation kernels against fp64 and the reference, on a GPU or interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE, needs_kernels
from latentwire_fast import ops, reference

# The interpreter computes lanes that a `where` then drops, and numpy warns of those.
pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def textbook_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """fp64 rows, from the definition."""
    log_p = (teacher.double() / tau).log_softmax(-1)
    log_q = (student.double() / tau).log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1) * tau**2


def triton_rows(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum) through the kernels."""
    student = student.clone().to(DEVICE).requires_grad_()
    with ops.backend("triton"):
        losses = ops.kd_kl(student, teacher.to(DEVICE), tau=tau, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), student)
    return losses.detach().cpu(), grad.cpu()


@pytest.mark.parametrize("tau", [0.5, 2.0])
@pytest.mark.parametrize("kl", [1e-7, 1e-5, 1e-3, 1e-1, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_over_its_range(kl: float, tau: float, dtype: torch.dtype) -> None:
    """Within 5e-5 of fp64 on the same rounded inputs; the gradient by its own size."""
    teacher = torch.randn(4, 5003) * 3
    student = teacher + torch.randn(4, 5003) * (2 * kl) ** 0.5 + 1.5
    student, teacher = student.to(dtype), teacher.to(dtype)
    losses, grad = triton_rows(student, teacher, tau)
    truth = textbook_kl(student, teacher, tau)
    torch.testing.assert_close(losses.double(), truth, rtol=5e-5, atol=1e-11)
    exact = student.double().requires_grad_()
    textbook_kl(exact, teacher, tau).sum().backward()
    assert exact.grad is not None
    # fp32: the shift of 1.5 is kept to 6e-8, which the differences of 4e-4 (KL 1e-7) notice.
    tolerance = 1e-3 if dtype == torch.float32 else 5e-3
    assert (grad.double() - exact.grad).norm() / exact.grad.norm() < tolerance


def test_an_atypical_first_tile_costs_no_accuracy() -> None:
    """The centre comes from the first tile: there all differences are 7, elsewhere small."""
    teacher = torch.randn(3, 5003)
    teacher[:, :2048] -= 30
    student = teacher + torch.randn(3, 5003) * 4e-3
    student[:, :2048] += 7
    student[1, :2048] = -torch.inf
    teacher[2, :2048] = -torch.inf
    losses, _ = triton_rows(student, teacher, 1.0)
    truth = textbook_kl(student, teacher, 1.0)
    truth[1] = textbook_kl(student[1, 2048:], teacher[1, 2048:], 1.0)
    torch.testing.assert_close(losses.double(), truth, rtol=5e-5, atol=1e-11)


def test_infinite_and_distant_logits() -> None:
    student, teacher = torch.randn(5, 300), torch.randn(5, 300) * 3
    teacher[0, :7] = -torch.inf
    student[1, 250:] = -torch.inf
    student[2, 250:] = teacher[2, 250:] = -torch.inf
    student[3, 0], teacher[3, 1] = 500.0, 500.0
    teacher[4] = student[4]
    losses, grad = triton_rows(student, teacher, 1.5)
    with ops.backend("reference"):
        expected = ops.kd_kl(student.requires_grad_(), teacher, tau=1.5, reduction="none")
        (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(losses, expected.detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-4, atol=1e-7)
    assert losses[4] == 0
    assert (grad[4] == 0).all()


def test_strided_logits_and_masked_rows() -> None:
    """Slices of a larger buffer; a masked row full of NaN."""
    student = torch.randn(2, 3, 90)[:, 1:, :77]
    teacher = torch.randn(2, 3, 90)[:, :2, 5:82]
    student[0, 1] = math.nan
    mask = torch.tensor([[True, False], [True, True]])
    grads = []
    for name, device in (("triton", DEVICE), ("reference", "cpu")):
        leaf = student.detach().clone().to(device).requires_grad_()
        with ops.backend(name):
            loss = ops.kd_kl(leaf, teacher.to(device), tau=2.0, mask=mask.to(device))
            loss.backward()
        grads.append((loss.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-8)
    assert (grads[0][1][0, 1] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_kl_equals_the_reference(
    softcap: float | None, separate: bool, reduction: Any
) -> None:
    """Shared and separate heads (the teacher's larger), chunks, a mask, both gradients."""
    rows, width, vocabulary = 7, 16, 2100
    student = torch.randn(rows, width)
    teacher = torch.randn(rows, 12) if separate else student + 0.01 * torch.randn(rows, width)
    weight = torch.randn(vocabulary, width) * width**-0.5
    other = torch.randn(vocabulary + 9, 12) * 0.3 if separate else None
    mask = torch.arange(rows) != 4
    results = []
    for name, device in (("triton", DEVICE), ("reference", "cpu")):
        hidden = student.clone().to(device).requires_grad_()
        head = weight.clone().to(device).requires_grad_(reduction == "mean")
        with ops.backend(name):
            loss = ops.linear_kd_kl(
                hidden,
                teacher.to(device),
                head,
                teacher_weight=None if other is None else other.to(device),
                tau=2.0,
                mask=mask.to(device),
                chunk_rows=3,
                reduction=reduction,
                softcap=softcap,
            )
            leaves = (hidden, head) if reduction == "mean" else (hidden,)
            grads = torch.autograd.grad(loss.sum(), leaves)
        results.append([t.detach().cpu() for t in (loss, *grads)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_linear_kl_gradient_at_a_small_divergence(dtype: torch.dtype) -> None:
    """KL 5e-5: the gradient within 2 % of fp64 on the same rounded hidden states."""
    width, vocabulary, rows = 64, 3001, 4
    weight = (torch.randn(vocabulary, width) * width**-0.5).to(dtype)
    teacher = torch.randn(rows, width).mul(3).to(dtype)
    student = (teacher.float() + torch.randn(rows, width) * 1e-2).to(dtype)
    head = weight.double()
    exact = student.double().requires_grad_()
    truth = textbook_kl(exact @ head.T, teacher.double() @ head.T, 1.0)
    truth.sum().backward()
    assert exact.grad is not None
    hidden = student.clone().to(DEVICE).requires_grad_()
    with ops.backend("triton"):
        loss = ops.linear_kd_kl(hidden, teacher.to(DEVICE), weight.to(DEVICE), reduction="sum")
        loss.backward()
    assert hidden.grad is not None
    error = (hidden.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02
    assert loss.item() == pytest.approx(truth.sum().item(), rel=5e-3)


def test_no_rows() -> None:
    weight = torch.randn(9, 4, device=DEVICE)
    hidden = torch.randn(0, 4, device=DEVICE, requires_grad=True)
    with ops.backend("triton"):
        loss = ops.linear_kd_kl(hidden, hidden.detach(), weight)
        loss.backward()
        assert ops.kd_kl(hidden, hidden.detach()).item() == 0
    assert loss.item() == 0


def test_reference_and_kernel_share_their_statistics() -> None:
    student, teacher = torch.randn(3, 500), torch.randn(3, 500)
    with ops.backend("triton"):
        _, stats = torch.ops.latentwire_fast.kd_kl(student.to(DEVICE), teacher.to(DEVICE), 2.0)
    _, expected = reference.kd_kl(student, teacher, tau=2.0)
    torch.testing.assert_close(stats.cpu(), expected, rtol=1e-5, atol=1e-6)
