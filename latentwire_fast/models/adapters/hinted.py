"""FiLM whose scale and shift also go by the hint that a latent ends with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.models.adapters.film import FiLMAdapter


class HintedAdapter(FiLMAdapter):
    """The adapter `film`, where the last latent changes the scale and the shift of all slots.

    That begins at nothing: a fresh one is a fresh `film`.
    """

    @dataclass(frozen=True)
    class Config(FiLMAdapter.Config):
        """A scale and a shift per slot and channel, which the latent and the hint of the encoder
        `hinted` change; nothing to set."""

        def check(self, run: RunConfig) -> None:
            """Raise unless there is a hint."""
            require(
                run.encoder.hints,
                f"adapter {self.kind!r} reads the hint of the encoder 'hinted', and this run's is "
                f"{run.encoder.kind!r}; take adapter 'film', or that encoder",
            )

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.hint = nn.Linear(d_z, 2 * d_model, bias=False)
        nn.init.zeros_(self.hint.weight)

    def modulation_of(self, latent_BMd: Tensor) -> Tensor:
        """With what the hint adds for all slots."""
        return super().modulation_of(latent_BMd) + self.hint(latent_BMd[:, -1:])
