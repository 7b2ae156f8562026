"""Settings of low-rank updates of a reader."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.config.base import Settings, require


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Low-rank updates of a reader's weights (LoRA, arXiv:2106.09685), trained with the rest of a
    run. The weights themselves stay as they are.

    Attributes:
        rank: of each update.
        alpha: an update is scaled by alpha / rank.
        dropout: of what an update reads, in training.
        projections: the linear layers that get one, by the last parts of their names; None: those
            of the attention.
        layers: only in so many of the first layers; None: in all of them.
        lr: factor on the run's `adamw_lr`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    projections: tuple[str, ...] | None = None
    layers: int | None = None
    lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("rank", "layers")
        for name in ("alpha", "lr"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)}, expected above 0")
        require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected at least 0, below 1")
        require(
            self.projections is None or (all(self.projections) and bool(self.projections)),
            f"projections={self.projections}: name one at least, or none for the attention's",
        )
