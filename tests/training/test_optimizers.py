"""Which optimiser takes which parameter, and at which rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentwire_fast.training.optimizers import (
    MUON_MIN_SIDE,
    build_optimizers,
    scale_learning_rates,
    split_parameters,
)

SHAPES = {
    "embed_tokens.weight": (64, 32),
    "layers.0.proj.weight": (32, 32),
    "layers.0.proj.bias": (32,),
    "layers.0.narrow.weight": (MUON_MIN_SIDE - 1, 64),
    "layers.0.just_wide_enough.weight": (64, MUON_MIN_SIDE),
    "convolve.weight": (32, 32, 5),
    "slots": (32, 32),
    "queries": (32, 32),
    "memory": (32, 32),
    "position": (32, 32),
    "gate": (),
}
MATRICES = {"layers.0.proj.weight", "layers.0.just_wide_enough.weight"}


@pytest.fixture
def named() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in SHAPES.items()]


def test_only_wide_matrices_that_are_no_tables_go_to_muon(
    named: list[tuple[str, nn.Parameter]],
) -> None:
    matrices, others = split_parameters(named)
    names = {id(p): n for n, p in named}
    assert {names[id(p)] for p in matrices} == MATRICES
    assert {names[id(p)] for p in others} == SHAPES.keys() - MATRICES


def test_frozen_parameters_have_no_optimiser(named: list[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named:
        parameter.requires_grad_(name == "gate")
    (only,) = build_optimizers(named, muon_lr=0.01, adamw_lr=1e-3)
    assert isinstance(only, torch.optim.AdamW)
    assert [len(group["params"]) for group in only.param_groups] == [1]


def test_every_parameter_has_one_optimiser(named: list[tuple[str, nn.Parameter]]) -> None:
    muon, adamw = build_optimizers(named, muon_lr=0.02, adamw_lr=3e-3, weight_decay=0.1)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    taken = [p for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert len(taken) == len(named)
    assert {id(p) for p in taken} == {id(p) for _, p in named}
    (group,) = muon.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.95, 0.1)
    (group,) = adamw.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.9, 0.98), 0.0)


def test_adamw_takes_everything_without_muon(named: list[tuple[str, nn.Parameter]]) -> None:
    (only,) = build_optimizers(named, muon_lr=None, adamw_lr=1e-3)
    assert isinstance(only, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in only.param_groups) == len(named)


def test_rates_scale_from_the_base_and_never_drift(
    named: list[tuple[str, nn.Parameter]],
) -> None:
    optimizers = build_optimizers(named, muon_lr=0.02, adamw_lr=3e-3)
    for factor in (0.5, 0.1, 0.0, 1.0):
        scale_learning_rates(optimizers, factor)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == [0.02 * factor, 3e-3 * factor]


def test_a_rate_of_zero_changes_nothing(named: list[tuple[str, nn.Parameter]]) -> None:
    optimizers = build_optimizers(named, muon_lr=0.02, adamw_lr=3e-3)
    scale_learning_rates(optimizers, 0.0)
    before = [p.detach().clone() for _, p in named]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))


def test_it_learns() -> None:
    """Both together fit a small regression that neither's start solves."""
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    inputs = torch.randn(64, 16)
    targets = torch.randn(16, 16) @ inputs.T
    optimizers = build_optimizers(net.named_parameters(), muon_lr=0.05, adamw_lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (net(inputs) - targets.T).square().mean()
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
