"""Optimisers and random generators go on bit for bit from what a checkpoint holds of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentwire_fast.errors import CheckpointError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.training.checkpoint import load_checkpoint, save_checkpoint
from latentwire_fast.training.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
    restore_rng_state,
    rng_state,
)


class Net(nn.Module):
    def __init__(self, *, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 16))
        self.norm = nn.LayerNorm(16)
        self.register_parameter("unused", nn.Parameter(torch.zeros(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


def optimizers_of(net: Net, *, backwards: bool = False) -> list[torch.optim.Optimizer]:
    matrices = [p for p in net.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if p.dim() != 2]
    if backwards:
        matrices, others = matrices[::-1], others[::-1]
    result: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), amsgrad=True),
        torch.optim.NAdam([nn.Parameter(torch.zeros(1))], lr=1e-3),
    ]
    net.register_parameter("extra", result[2].param_groups[0]["params"][0])
    for optimizer in result:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return result


def train(net: Net, optimizers: list[torch.optim.Optimizer], rng: random.Random) -> list[float]:
    losses = []
    for step in range(5):
        rows = torch.randn(8, 16) * rng.uniform(0.5, 1.5) + float(np.random.rand())  # noqa: NPY002
        loss = net(rows).square().mean() + net.get_parameter("extra").cos().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["base_lr"] / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save_all(
    folder: Path, net: Net, optimizers: list[torch.optim.Optimizer], rng: random.Random
) -> None:
    optimizer_tensors, optimizer_json = optimizer_state(optimizers, net.named_parameters())
    rng_tensors, rng_json = rng_state({"data": rng})
    tensors = {"model": net.state_dict(), "optimizer": optimizer_tensors, "rng": rng_tensors}
    save_checkpoint(
        folder, step=5, tensors=tensors, state={"optimizer": optimizer_json, "rng": rng_json}
    )


def test_training_goes_on_bit_exactly_from_a_checkpoint(tmp_path: Path) -> None:
    net, rng = Net(seed=1), random.Random(5)
    optimizers = optimizers_of(net)
    train(net, optimizers, rng)
    rng.gauss(0, 1)  # leaves a second value in the generator's state
    save_all(tmp_path, net, optimizers, rng)
    losses = train(net, optimizers, rng)
    numbers = (rng.gauss(0, 1), random.random(), float(np.random.rand()))  # noqa: NPY002

    loaded = load_checkpoint(tmp_path)
    again, rng_again = Net(seed=2), random.Random(6)
    optimizers_again = optimizers_of(again, backwards=True)
    again.load_state_dict(loaded.tensors["model"])
    load_optimizer_state(
        optimizers_again,
        again.named_parameters(),
        tensors=loaded.tensors["optimizer"],
        state=loaded.state["optimizer"],
    )
    digest = parameter_digest(loaded.tensors["optimizer"].items())
    restore_rng_state({"data": rng_again}, tensors=loaded.tensors["rng"], state=loaded.state["rng"])
    assert train(again, optimizers_again, rng_again) == losses
    assert parameter_digest(again.named_parameters()) == parameter_digest(net.named_parameters())
    assert optimizer_state(optimizers, net.named_parameters())[1]["optimizers"][0]["groups"][0][
        "ns_coefficients"
    ] == (3.4445, -4.775, 2.0315)
    ended, _ = optimizer_state(optimizers, net.named_parameters())
    ended_again, _ = optimizer_state(optimizers_again, again.named_parameters())
    assert parameter_digest(ended.items()) == parameter_digest(ended_again.items())
    assert parameter_digest(loaded.tensors["optimizer"].items()) == digest, "updated in place"
    assert numbers == (rng_again.gauss(0, 1), random.random(), float(np.random.rand()))  # noqa: NPY002


@pytest.mark.parametrize("change", ["kind", "number", "parameters", "groups", "unnamed"])
def test_optimisers_of_another_run_are_refused_unchanged(change: str) -> None:
    net = Net(seed=1)
    optimizers = optimizers_of(net)
    train(net, optimizers, random.Random(0))
    tensors, state = optimizer_state(optimizers, net.named_parameters())
    other = Net(seed=2)
    fresh = optimizers_of(other)
    named = list(other.named_parameters())
    if change == "kind":
        fresh[1] = torch.optim.Adam(fresh[1].param_groups[0]["params"])
    elif change == "number":
        fresh.pop()
    elif change == "parameters":
        fresh[1] = torch.optim.AdamW(fresh[1].param_groups[0]["params"][:-1])
    elif change == "groups":
        parameters = fresh[1].param_groups[0]["params"]
        fresh[1] = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    else:
        named = named[1:]
    with pytest.raises(CheckpointError, match="optimiser"):
        load_optimizer_state(fresh, named, tensors=tensors, state=state)
    assert all(not optimizer.state for optimizer in fresh)
    if change == "unnamed":
        with pytest.raises(CheckpointError, match="not among the named parameters"):
            optimizer_state(fresh, named)


def test_random_generators_of_another_run_are_refused() -> None:
    tensors, state = rng_state({"data": random.Random(1)})
    with pytest.raises(CheckpointError, match=r"\['data'\].*\['order'\]"):
        restore_rng_state({"order": random.Random(1)}, tensors=tensors, state=state)


def test_other_number_of_devices_warns(caplog: pytest.LogCaptureFixture) -> None:
    tensors, state = rng_state({})
    extra = {f"cuda.{torch.cuda.device_count()}": tensors["cpu"]}
    restore_rng_state({}, tensors={**tensors, **extra}, state=state)
    assert "random numbers on them will differ" in caplog.text


@pytest.mark.gpu
def test_cuda_generators_round_trip(tmp_path: Path) -> None:
    tensors, state = rng_state({})
    save_checkpoint(tmp_path, step=1, tensors={"rng": tensors}, state=state)
    drawn = torch.rand(8, device="cuda")
    loaded = load_checkpoint(tmp_path)
    restore_rng_state({}, tensors=loaded.tensors["rng"], state=loaded.state)
    assert torch.equal(torch.rand(8, device="cuda"), drawn)


@pytest.fixture(autouse=True)
def _global_generators_as_before() -> Iterator[None]:
    tensors, state = rng_state({})
    yield
    restore_rng_state({}, tensors=tensors, state=state)
