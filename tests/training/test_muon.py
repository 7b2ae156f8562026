"""Muon's update in fp32: against the recurrence in fp64, and against torch's own in bf16."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentwire_fast.training import muon
from latentwire_fast.training.muon import Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS, STEPS = 1e-7, 5
# square, wide enough for the iterations on X X^T, nearly so, tall, and one of its kind
SHAPES = ((24, 24), (24, 24), (16, 64), (64, 16), (16, 31), (31, 16), (20, 40), (128, 17))


def newton_schulz(matrix: Tensor) -> Tensor:
    """The recurrence as it is written in torch, in fp64."""
    a, b, c = COEFFICIENTS
    x = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    """Parameters with gradients whose sizes lie far apart."""
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for i, parameter in enumerate(found):
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (i - 4)
    return found


def copies(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    found = [nn.Parameter(p.detach().clone()) for p in parameters]
    for copied, parameter in zip(found, parameters, strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    return found


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 40), (24, 48), (160, 1280)])
@pytest.mark.parametrize("rank", [None, 2], ids=["full rank", "nearly rank 2"])
def test_the_iteration_is_the_recurrence(rows: int, columns: int, rank: int | None) -> None:
    stack = torch.randn(3, rows, columns)
    if rank:  # a gradient that has few directions, and noise
        stack = torch.randn(3, rows, rank) @ torch.randn(3, rank, columns) + 1e-4 * stack
    expected = torch.stack([newton_schulz(matrix) for matrix in stack])
    settings: dict[str, Any] = {"coefficients": COEFFICIENTS, "steps": STEPS, "eps": EPS}
    torch.testing.assert_close(
        orthogonalize(stack.double(), **settings), expected, atol=1e-10, rtol=0
    )
    single = orthogonalize(stack, **settings)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=2e-4, rtol=0)


def test_a_gradient_of_zero_changes_nothing_but_the_decay() -> None:
    parameter = nn.Parameter(torch.ones(16, 16))
    parameter.grad = torch.zeros(16, 16)
    Muon([parameter], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(parameter.detach(), torch.full((16, 16), 0.95))


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_steps_are_the_formula(options: dict[str, Any]) -> None:
    """Three steps of every shape against the written update in fp64."""
    parameters = matrices(*SHAPES)
    lr, decay, momentum = 0.02, 0.1, 0.95
    expected = [p.detach().double() for p in parameters]
    buffers = [torch.zeros_like(value) for value in expected]
    optimizer = Muon(parameters, lr=lr, momentum=momentum, weight_decay=decay, **options)
    for _ in range(3):
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(SHAPES[i])
            parameter.grad = gradient.clone()
            buffers[i] = momentum * buffers[i] + (1 - momentum) * gradient.double()
            update = buffers[i]
            if options.get("nesterov", True):
                update = (1 - momentum) * gradient.double() + momentum * update
            rows, columns = SHAPES[i]
            factor = math.sqrt(max(1.0, rows / columns))
            if "adjust_lr_fn" in options:
                factor = 0.2 * math.sqrt(max(rows, columns))
            expected[i] = (1 - lr * decay) * expected[i] - lr * factor * newton_schulz(update)
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, atol=1e-5, rtol=0)


def test_torch_agrees_within_bf16() -> None:
    """One step of torch's optimiser. Its bf16 moves single values by up to a third of the largest,
    and the whole update by far less."""
    parameters = matrices(*SHAPES)
    theirs = copies(parameters)
    before = copies(parameters)
    ours = Muon(parameters, lr=1.0, weight_decay=0.0)
    other = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0)
    ours.step()
    other.step()
    for mine, their, start in zip(parameters, theirs, before, strict=True):
        move, their_move = (mine - start).detach(), (their - start).detach()
        assert (move - their_move).norm() < 0.1 * their_move.norm()
    for mine, their in zip(parameters, theirs, strict=True):
        assert torch.equal(
            ours.state[mine]["momentum_buffer"], other.state[their]["momentum_buffer"]
        )


def test_the_state_is_that_of_torch() -> None:
    """Each optimiser goes on from the other's state."""
    parameters = matrices(*SHAPES)
    theirs = copies(parameters)
    ours, other = Muon(parameters, lr=0.1), torch.optim.Muon(theirs, lr=0.1)
    ours.step()
    other.step()
    mine, their = copy.deepcopy(ours.state_dict()), copy.deepcopy(other.state_dict())
    assert mine["param_groups"] == their["param_groups"]
    torch.testing.assert_close(mine["state"], their["state"], rtol=0, atol=0)
    ours.load_state_dict(their)
    other.load_state_dict(mine)
    ours.step()
    other.step()


def test_a_parameter_without_a_gradient_is_left_out() -> None:
    parameters = matrices((16, 16), (16, 16))
    parameters[0].grad = None
    before = copies(parameters)
    optimizer = Muon(parameters, lr=0.1)
    optimizer.step()
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])
    assert list(optimizer.state) == [parameters[1]]
    assert optimizer.step(lambda: 3.0) == 3.0


def test_small_stacks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices go through in parts where they are many, and one that is too large alone."""
    parameters = matrices(*[(16, 16)] * 5, (16, 64))
    apart = copies(parameters)
    Muon(parameters, lr=0.1).step()
    monkeypatch.setattr(muon, "STACK_VALUES", 2 * 16 * 16)
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(apart, parameters, rtol=0, atol=1e-6)


def test_other_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self, closure=None: asked.append(self))
    parameter = nn.Parameter(torch.empty(16, 16, device="meta"))
    optimizer = Muon([parameter], lr=0.1)
    optimizer.step()
    assert asked == [optimizer]
