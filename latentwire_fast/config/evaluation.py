"""Settings of the evaluation after training, and of how answers are decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentwire_fast.config.base import Settings, require


def check_decoding(temperature: float, top_p: float, eos_ban_steps: int) -> None:
    """Raise unless answers can be decoded with these (temperature 0 is greedy).

    Raises:
        ConfigError: a value outside its range.
    """
    require(
        0 <= temperature < math.inf, f"first_token_temperature={temperature}, expected 0 or above"
    )
    require(0 < top_p <= 1, f"first_token_top_p={top_p}, expected in (0, 1]")
    require(eos_ban_steps >= 0, f"eos_ban_steps={eos_ban_steps}, expected at least 0")


@dataclass(frozen=True)
class ContinuationConfig(Settings):
    """Paragraphs whose second half readers predict, given the first as text and as a payload.

    Attributes:
        source: as in `DataConfig`; all of it, so no training text may be in it.
        examples: how many paragraphs.
    """

    source: str
    examples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.examples >= 2, f"examples={self.examples}, expected at least 2")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """Evaluation after training.

    Attributes:
        bits: the widths that payloads are scored at, beside the run's own. A bottleneck that sends
            none of them is scored at all that it sends.
        continuation: a measure of running text beside the questions; context mode only.
    """

    batch_size: int = 50
    max_new_tokens: int = 12
    bits: tuple[int, ...] = (16, 8, 6, 4)
    timing_examples: int = 16
    resamples: int = 2000
    first_token_temperature: float = 0.0
    first_token_top_p: float = 1.0
    eos_ban_steps: int = 0
    continuation: ContinuationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("batch_size", "max_new_tokens", "timing_examples", "resamples")
        for bits in self.bits:
            require(bits >= 1, f"bits={bits}, expected widths that the bottleneck sends")
        check_decoding(self.first_token_temperature, self.first_token_top_p, self.eos_ban_steps)
