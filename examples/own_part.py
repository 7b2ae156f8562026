"""A part of your own: an adapter that this file registers, trained and loaded like any other.

    python examples/own_part.py

docs/extending.md has an example of every kind of part.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

import latentwire_fast as lw
from latentwire_fast.config.schema import AdapterConfig
from latentwire_fast.models.adapters.base import Adapter
from latentwire_fast.registry import ADAPTERS, ATTACHMENTS


class Doubled(Adapter):
    """The latent beside its square, before the projection to the reader's width."""

    @dataclass(frozen=True)
    class Config(AdapterConfig):
        """Nothing to set."""

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.shape = (d_model, 2 * d_z)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        return torch.cat([latent_BMd, latent_BMd.square()], -1)

    def first_projection(self) -> Tensor:
        return torch.randn(self.shape) * self.shape[1] ** -0.5


def main(run: Path = Path("runs/own_part"), preset: str = "testbed_smoke") -> None:
    """Train a few steps with the adapter, and load what was saved.

    Args:
        run: the folder of the run.
        preset: what else is in the model.
    """
    ADAPTERS.register("doubled", Doubled)
    soft = ATTACHMENTS.config("soft", adapter=ADAPTERS.config("doubled"))
    lw.train(replace(lw.load_preset(preset), attachments=(soft,)), run, evaluate=False)
    model = lw.Interlingua.from_pretrained(run / "model")
    found = {type(part).__name__ for part in model.modules()}
    print(f"trained, saved and loaded: {'Doubled' in found}")


if __name__ == "__main__":
    tyro.cli(main)
