"""A deep prefix made by the kernels is the one that their reference makes, and trains alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE, needs_kernels
from latentwire_fast import ops
from latentwire_fast.models.attachments.deep import DeepPrefix
from latentwire_fast.readers.kv_geometry import KVGeometry

M, D_Z = 4, 8
GEOMETRY = KVGeometry(layers=2, heads=2, head_width=24, rms=((1.0, 2.0), (3.0, 0.5)))


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
def test_a_deep_prefix_and_its_gradients(calibration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentwire_fast.kernels import projection_tiles

    config = DeepPrefix.Config(width=64, expansion=2, calibration=calibration)
    deep = DeepPrefix(config, latents=M, d_z=D_Z, geometry=GEOMETRY).to(DEVICE)
    latent_BMd = torch.randn(3, M, D_Z, device=DEVICE, requires_grad=True)
    leaves = [latent_BMd, *deep.parameters()]
    launches: list[int] = []
    run = projection_tiles.Tiles._run

    def counted(self: Any, mode: int, *arguments: Any, **settings: Any) -> None:
        launches.append(mode)
        run(self, mode, *arguments, **settings)

    monkeypatch.setattr(projection_tiles.Tiles, "_run", counted)
    results: dict[str, list[Tensor]] = {}
    for backend in ("reference", "triton"):
        with ops.backend(backend):
            made = deep(latent_BMd, gain=1.5)
            grads = torch.autograd.grad(made.sin().sum(), leaves)
        results[backend] = [made.detach(), *grads]
    for found, expected in zip(results["triton"], results["reference"], strict=True):
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * largest)
    # Squares, write; dots, gradient: all of it is made by kernels, in groups.
    assert launches == ([1, 2, 3] if calibration == "none" else [0, 1, 2, 3])
