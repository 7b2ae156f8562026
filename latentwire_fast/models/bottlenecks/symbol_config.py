"""The settings of bottlenecks that send symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import BottleneckConfig

Prior = Literal["flat", "static", "autoregressive"]


@dataclass(frozen=True)
class SymbolConfig(BottleneckConfig):
    """What the settings of every bottleneck that sends symbols have.

    Attributes:
        prior: `static` learns how often each symbol comes, at the end of the training, so that
            payloads are short; `autoregressive` also, how that goes by the symbols before, for
            shorter ones that take longer to code; `flat` takes all for equally likely.
        prior_texts: training texts that a prior learns from.
        prior_steps: of the training of `autoregressive`.
        prior_width: numbers that `autoregressive` keeps of the symbols before.
        running_prior: keep in training how often each symbol comes, for the objective `rate`.
    """

    prior: Prior = "static"
    prior_texts: int = 2000
    prior_steps: int = 1000
    prior_width: int = 64
    running_prior: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("prior_texts", "prior_steps", "prior_width")
        require(self.prior_width <= 1024, f"prior_width={self.prior_width}, expected up to 1024")
        if self.running_prior:
            require(
                self.registry.part_of(self).has_soft_symbols and self.prior != "flat",
                "running_prior=True needs prior='static' or 'autoregressive', and a bottleneck "
                "whose symbols have an order (uniform, fsq or soft_codebook)",
            )
