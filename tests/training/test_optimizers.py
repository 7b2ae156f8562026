"""Which optimiser takes which parameter, and at which rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from latentwire_fast.config.presets import load_preset
from latentwire_fast.config.schema import OptimConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.training.builders import build_model
from latentwire_fast.training.muon import Muon
from latentwire_fast.training.optimizers import (
    MUON_MIN_SIDE,
    build_optimizers,
    pretrained_parameters,
    scale_learning_rates,
    table_parameters,
)

BOTH = OptimConfig(muon_lr=0.02, adamw_lr=3e-3, weight_decay=0.1)
SHAPES = {
    "projection": (32, 32),
    "bias": (32,),
    "narrow": (MUON_MIN_SIDE - 1, 64),
    "just_wide_enough": (64, MUON_MIN_SIDE),
    "filters": (32, 32, 5),
    "slots": (32, 32),
    "tokens.llama": (32, 32),
    "lookup.weight": (64, 32),
    "queries.0.weight": (32, 32),
    "gate": (),
}
MATRICES = {"projection", "just_wide_enough"}


class Part(nn.Module):
    """A module with parameters of each kind, some of which it names as tables."""

    table_parameters = ("slots", "tokens", "queries", "of_other_settings")

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.tokens = nn.ParameterDict({"llama": nn.Parameter(torch.randn(32, 32))})
        self.lookup = nn.Embedding(64, 32)
        self.queries = nn.ModuleList([nn.Linear(32, 32, bias=False)])


class Whole(nn.Module):
    """A pretrained part beside a new one."""

    pretrained_modules = ("core",)

    def __init__(self) -> None:
        super().__init__()
        self.core = Part()
        self.added = Part()


def taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[set[str]]:
    """Names of an optimiser's parameters, group by group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in optimizer.param_groups]


@pytest.fixture
def part() -> Part:
    return Part()


def test_only_wide_matrices_that_are_no_tables_go_to_muon(part: Part) -> None:
    muon, adamw = build_optimizers(part, BOTH)
    assert {name for name, _ in part.named_parameters()} == SHAPES.keys()
    assert taken(part, muon) == [MATRICES]
    assert taken(part, adamw) == [SHAPES.keys() - MATRICES]


def test_frozen_parameters_have_no_optimiser(part: Part) -> None:
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(name == "gate")
    (only,) = build_optimizers(part, BOTH)
    assert isinstance(only, torch.optim.AdamW)
    assert taken(part, only) == [{"gate"}]


def test_every_parameter_has_one_optimiser(part: Part) -> None:
    muon, adamw = build_optimizers(part, BOTH)
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    everything = [p for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert len(everything) == len(SHAPES)
    assert set(everything) == set(part.parameters())
    (group,) = muon.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.95, 0.1)
    (group,) = adamw.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.9, 0.98), 0.0)


def test_adamw_takes_everything_without_muon(part: Part) -> None:
    (only,) = build_optimizers(part, replace(BOTH, muon_lr=None))
    assert isinstance(only, torch.optim.AdamW)
    assert taken(part, only) == [set(SHAPES)]


def test_a_pretrained_module_has_its_own_rate() -> None:
    model = Whole()
    assert pretrained_parameters(model) == set(model.core.parameters())
    muon, adamw = build_optimizers(model, replace(BOTH, encoder_lr=0.5))
    for optimizer, names in ((muon, MATRICES), (adamw, SHAPES.keys() - MATRICES)):
        assert taken(model, optimizer) == [
            {f"{part}.{name}" for name in names} for part in ("added", "core")
        ]
    assert [g["base_lr"] for o in (muon, adamw) for g in o.param_groups] == [
        0.02,
        0.01,
        3e-3,
        1.5e-3,
    ]
    assert [len(o.param_groups) for o in build_optimizers(model, BOTH)] == [1, 1]


def test_a_table_that_is_also_a_head_stays_a_table() -> None:
    model = nn.ModuleDict({"head": nn.Linear(32, 64, bias=False), "embed": nn.Embedding(64, 32)})
    model["head"].weight = model["embed"].weight
    assert table_parameters(model) == {model["embed"].weight}
    (only,) = build_optimizers(model, BOTH)
    assert taken(model, only) == [{"head.weight"}]


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("table_parameters", "slots", "Part.table_parameters='slots': a tuple of names"),
        ("table_parameters", ("forward",), "names 'forward', which is neither a parameter nor"),
        ("pretrained_modules", ("slots",), "a parameter is named where a module belongs"),
    ],
)
def test_a_wrong_name_is_refused(
    part: Part, monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, words: str
) -> None:
    monkeypatch.setattr(Part, attribute, value, raising=False)
    with pytest.raises(ConfigError, match=words):
        build_optimizers(part, BOTH)


@pytest.fixture(scope="module")
def testbed_readers() -> dict[str, Reader]:
    return load_readers(load_preset("testbed").readers, torch.device("cpu"))


@pytest.mark.parametrize("preset", ["testbed", "testbed_context", "testbed_byte", "testbed_smoke"])
@pytest.mark.parametrize("latents", [12, 32])
def test_the_presets_models_say_what_they_are(
    testbed_readers: dict[str, Reader], preset: str, latents: int
) -> None:
    """Tables and the pretrained LM by name, as they were told apart before modules said so."""
    config = load_preset(preset)
    config = replace(config, encoder=replace(config.encoder, latents=latents))
    model = build_model(config, testbed_readers)
    trained = dict(model.trained_parameters())
    words = ("embed", "slot", "quer", "memory", "position")
    tables = {n for n, p in trained.items() if any(word in n for word in words)}
    wide = {n for n, p in trained.items() if p.dim() == 2 and min(p.shape) >= MUON_MIN_SIDE}
    pretrained = {n for n in trained if n.startswith("encoder.core.")}
    muon, adamw = build_optimizers(model, replace(config.optim, encoder_lr=0.1))
    for optimizer, names in ((muon, wide - tables), (adamw, trained.keys() - (wide - tables))):
        groups = [names - pretrained, names & pretrained]
        assert taken(model, optimizer) == [group for group in groups if group]


def test_rates_scale_from_the_base_and_never_drift(part: Part) -> None:
    optimizers = build_optimizers(part, BOTH)
    for factor in (0.5, 0.1, 0.0, 1.0):
        scale_learning_rates(optimizers, factor)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == [0.02 * factor, 3e-3 * factor]


def test_a_rate_of_zero_changes_nothing(part: Part) -> None:
    optimizers = build_optimizers(part, BOTH)
    scale_learning_rates(optimizers, 0.0)
    before = [p.detach().clone() for p in part.parameters()]
    for parameter in part.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(part.parameters(), before, strict=True))


def test_it_learns() -> None:
    """Both together fit a small regression that neither's start solves."""
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    inputs = torch.randn(64, 16)
    targets = torch.randn(16, 16) @ inputs.T
    optimizers = build_optimizers(net, OptimConfig(muon_lr=0.05, adamw_lr=1e-2))
    losses = []
    for _ in range(60):
        loss = (net(inputs) - targets.T).square().mean()
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
