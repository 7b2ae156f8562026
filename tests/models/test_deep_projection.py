"""A deep prefix's last stage: one projection with a calibration group per layer, key or value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.models.attachments.deep import DeepPrefix
from latentwire_fast.readers.kv_geometry import KVGeometry

M, D_Z = 4, 8
GEOMETRY = KVGeometry(layers=3, heads=2, head_width=8, rms=((1.0, 2.0), (3.0, 0.5), (1.5, 1.0)))


def module(calibration: str = "none") -> DeepPrefix:
    config = DeepPrefix.Config(width=64, expansion=2, calibration=calibration)  # type: ignore[arg-type]
    return DeepPrefix(config, latents=M, d_z=D_Z, geometry=GEOMETRY)


def projected_in_torch(deep: DeepPrefix, latent_BMd: Tensor, gain: float) -> Tensor:
    """The module's formula with a Linear and a product, as it was before it was an op."""
    lifted_BMW = deep.lift(latent_BMd) + deep.slots
    hidden_BMW = lifted_BMW + deep.down(nn.functional.silu(deep.up(deep.norm(lifted_BMW))))
    g = deep.geometry
    made = deep.project(deep.body(hidden_BMW)).unflatten(-1, (g.layers, 2, g.heads, g.head_width))
    scale_L2 = torch.stack([deep.gain[:, 0], gain * deep.gain[:, 1]], 1)
    return made.permute(2, 3, 0, 4, 1, 5) * scale_L2[:, :, None, None, None, None]


@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_without_calibration_it_is_a_linear_and_a_product_bit_for_bit(gain: float) -> None:
    """Values in the same memory layout; gradients to rounding, a sum's order apart."""
    deep, latent_BMd = module(), torch.randn(5, M, D_Z, requires_grad=True)
    found, expected = deep(latent_BMd, gain=gain), projected_in_torch(deep, latent_BMd, gain)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    leaves = [latent_BMd, *deep.parameters()]
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(out, leaves, weights) for out in (found, expected))
    for o, t in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
def test_calibrated_keys_and_values_have_their_gains_rms(calibration: str) -> None:
    """Whatever the weights: the learned gains are the RMS of each layer's keys and values."""
    deep = module(calibration)
    with torch.no_grad():
        deep.project.weight.mul_(torch.logspace(-1, 1, len(deep.project.weight))[:, None])
        made_L2BHMD = deep(torch.randn(5, M, D_Z), gain=2.0)
    dims = {"token": (3, 5), "example": (3, 4, 5), "batch": (2, 3, 4, 5)}[calibration]
    rms = made_L2BHMD.square().mean(dims, keepdim=True).sqrt()
    wanted = deep.gain.detach() * torch.tensor([1.0, 2.0])
    wanted = wanted[:, :, None, None, None, None].expand(rms.shape)
    torch.testing.assert_close(rms, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
def test_every_parameter_and_the_latent_receive_a_gradient(calibration: str) -> None:
    deep, latent_BMd = module(calibration), torch.randn(2, M, D_Z, requires_grad=True)
    made = deep(latent_BMd)
    (made * torch.randn_like(made)).sum().backward()
    assert latent_BMd.grad is not None
    assert bool(latent_BMd.grad.any(-1).all())
    assert all(p.grad is not None and bool(p.grad.any()) for p in deep.parameters())


def test_it_multiplies_in_the_dtype_of_autocast() -> None:
    """The LayerNorm before it leaves fp32, in which a GPU would be several times slower."""
    deep, latent_BMd = module(), torch.randn(2, M, D_Z)
    with torch.autocast("cpu", torch.bfloat16):
        made = deep(latent_BMd)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), deep(latent_BMd), rtol=0.1, atol=0.1)
