"""From the output embedding to a model's logits: some families scale or cap what it gives.

Shapes: `[..., V]` logits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What configurations call them. Where a model ignores its own entry, `checks.py` finds out.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logit_softcap", "logit_softcap")


@dataclass(frozen=True)
class LogitTransform:
    """`cap * tanh(scale * logits / cap)`: scaling as in Cohere and Granite, capping as in Gemma 2.

    Attributes:
        scale: 1 where there is none.
        softcap: 0 where there is none.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits `[..., V]` as the model gives them, of what its output embedding gives."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits

    @classmethod
    def declared(cls, config: Any) -> LogitTransform:
        """What a model's configuration asks for."""
        scale = 1.0
        for factor in _numbers(config, _FACTORS):
            scale *= factor
        for divisor in _numbers(config, _DIVISORS):
            scale /= divisor
        return cls(scale, next(iter(_numbers(config, _CAPS)), 0.0))


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    """The numbers under these names that change anything; some models keep a word or none there."""
    found = (getattr(config, name, None) for name in names)
    return [float(value) for value in found if isinstance(value, int | float) and value]
