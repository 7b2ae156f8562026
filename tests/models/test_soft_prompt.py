"""Adapters: the size of what they put before a reader, and that all of them learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire_fast import ops
from latentwire_fast.models.attachments.soft import SoftPrompt
from runs import soft

B, M, D_Z, D = 3, 4, 8, 24
TARGET_RMS = 0.37
KINDS = ["linear", "mlp", "film"]


def adapter(kind: str, **options: Any) -> SoftPrompt:
    """Soft tokens with this adapter."""
    config: Any = soft(kind, **options)
    return SoftPrompt(config, latents=M, d_z=D_Z, d_model=D, target_rms=TARGET_RMS)


def rms(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.pow(2).mean(dims).sqrt()


@pytest.fixture
def latent() -> Tensor:
    """Slots and examples of very different size."""
    scale = torch.tensor([0.1, 1.0, 7.0]).view(B, 1, 1) * torch.arange(1.0, M + 1).view(1, M, 1)
    return torch.randn(B, M, D_Z) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize(
    ("calibration", "dims"),
    [("token", (-1,)), ("example", (-2, -1)), ("batch", (-3, -2, -1))],
)
@torch.no_grad()
def test_output_rms_is_the_readers_times_the_gain(
    latent: Tensor, kind: str, tanh: bool, calibration: str, dims: tuple[int, ...]
) -> None:
    module = adapter(kind, calibration=calibration, gain=1.5, tanh=tanh)
    prefix = module(latent)
    assert prefix.shape == (B, M, D)
    found = rms(prefix, dims)
    torch.testing.assert_close(found, torch.full_like(found, 1.5 * TARGET_RMS), rtol=1e-4, atol=0)
    louder = rms(module(latent, gain=2.0), dims)
    torch.testing.assert_close(louder, torch.full_like(found, 3 * TARGET_RMS), rtol=1e-4, atol=0)
    if calibration == "example":
        assert rms(prefix, (-1,)).std() > 1e-3, "tokens keep their relative size"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_calibration_only_the_gain_scales(latent: Tensor, kind: str) -> None:
    module = adapter(kind, calibration="none")
    prefix = module(latent)
    torch.testing.assert_close(module(latent, gain=3.0), 3 * prefix)
    calibrated = module(latent, calibration="token")
    cosine = torch.nn.functional.cosine_similarity(prefix, calibrated, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert rms(prefix, (-1,)).std() > 1e-3


@torch.no_grad()
def test_linear_is_layer_norm_and_projection(latent: Tensor) -> None:
    """The formula, with every part away from its initial value."""
    module = adapter("linear", tanh=True)
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    normed = torch.nn.functional.layer_norm(
        latent, (D_Z,), module.adapter.norm.weight, module.adapter.norm.bias
    )
    y = torch.tanh(normed @ module.weight.T + module.bias)
    y = y * TARGET_RMS / rms(y, (-1,))[..., None]
    torch.testing.assert_close(module(latent), module.gamma * y + module.beta, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mlp_is_residual_at_the_readers_width(latent: Tensor) -> None:
    module = adapter("mlp", expansion=2)
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    mlp: Any = module.adapter
    lifted = mlp.lift(latent) + mlp.slots
    hidden = lifted + mlp.down(torch.nn.functional.silu(mlp.up(lifted)))
    y = hidden @ module.weight.T + module.bias
    y = y * TARGET_RMS / rms(y, (-1,))[..., None]
    assert mlp.up.weight.shape == (2 * D, D)
    torch.testing.assert_close(module(latent), module.gamma * y + module.beta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibration", ["none", "token", "example", "batch"])
def test_every_parameter_and_the_latent_get_a_gradient(
    latent: Tensor, kind: str, calibration: str
) -> None:
    module = adapter(kind, calibration=calibration, tanh=kind == "linear")
    latent.requires_grad_()
    (module(latent) * torch.randn(B, M, D)).sum().backward()
    gradients = {"latent": latent.grad, **{n: p.grad for n, p in module.named_parameters()}}
    assert [n for n, g in gradients.items() if g is None or not g.abs().sum() > 0] == []


@torch.no_grad()
def test_slots_tell_equal_latents_apart_in_the_mlp() -> None:
    same = torch.randn(1, 1, D_Z).expand(1, M, D_Z)
    prefix = adapter("mlp")(same)[0]
    assert torch.cdist(prefix, prefix).add(torch.eye(M)).min() > 1e-3
    for module in (adapter("film"), adapter("linear", positions=True)):
        prefix = module(same)[0]
        assert torch.cdist(prefix, prefix).add(torch.eye(M)).min() > 1e-3
    linear = adapter("linear")(same)[0]
    assert torch.equal(linear, linear[:1].expand_as(linear))


@torch.no_grad()
def test_film_scales_and_shifts_each_slot(latent: Tensor) -> None:
    """The formula; a fresh adapter is its lift."""
    film: Any = adapter("film").adapter
    lifted = film.lift(latent) + film.slots
    assert torch.equal(film(latent), lifted)
    film.modulation.normal_()
    film.condition.weight.normal_()
    scale, shift = (film.modulation + latent @ film.condition.weight.T).split(D, -1)
    torch.testing.assert_close(film(latent), (1 + scale) * lifted + shift)
    assert adapter("linear").reads_codes
    assert not adapter("linear", positions=True).reads_codes


def test_dropout_only_in_training(latent: Tensor) -> None:
    module = adapter("mlp", dropout=0.5)
    assert not torch.equal(module(latent), module(latent))
    module.eval()
    assert torch.equal(module(latent), module(latent))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_F13_the_projection_multiplies_in_the_dtype_of_autocast(latent: Tensor, kind: str) -> None:
    """As a Linear would; a fp32 sum or LayerNorm before it makes no difference. Calibrated in
    fp32: the RMS is reached as exactly as bf16 can hold it."""
    module = adapter(kind).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prefix = module(latent)
        rows = module.adapter(latent).bfloat16()
    assert prefix.dtype == torch.bfloat16
    assert torch.equal(prefix, ops.project_calibrate(rows, **module._projection()))
    torch.testing.assert_close(prefix.float(), module(latent), rtol=0.1, atol=0.1 * TARGET_RMS)
    rms = prefix.float().square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, TARGET_RMS), rtol=4e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reported_rms(latent: Tensor, kind: str) -> None:
    module = adapter(kind, gain=2.0).eval()
    report = module.rms(latent)
    assert report["post"] == pytest.approx(2 * TARGET_RMS, rel=1e-3)
    assert report["post_p5"] == pytest.approx(2 * TARGET_RMS, rel=1e-3), "calibrated by token"
    by_example = adapter(kind, calibration="example").eval().rms(latent)
    assert by_example["post_p5"] < TARGET_RMS < by_example["post_p95"]
    raw = module(latent, calibration="none")
    assert report["pre"] == pytest.approx(raw.pow(2).mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
@torch.no_grad()
def test_a_zero_latent_gives_a_finite_prefix(calibration: str) -> None:
    for kind in KINDS:
        assert adapter(kind, calibration=calibration)(torch.zeros(B, M, D_Z)).isfinite().all()
