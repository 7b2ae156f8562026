"""What the poolers have in common that read several of an LM's layers and mix them with a
transformer: `cross_attention` and `layer_spans`.

Keys and values of a reader's layer are linear in what stands before that layer, so a deep prefix
wants more than the last layer's states. The LM runs over the text alone: with a frozen LM its
states can be kept (`training/frozen_work.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.layers import check_heads
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.token_states import StatesFacts


class LayerStatesPooler(Pooler):
    """A pooler of several layers' states.

    Attributes:
        latents: how many there are, M.
        state_layers: the layers that it reads, 0 for the embeddings.
    """

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Which states are read, and the transformer between them and the latents.

        Attributes:
            states: of how many of the LM's layers, evenly from its embeddings to its last.
            layers, heads: of the transformer.
            expansion: inner width of its MLPs, as a multiple of its width.
            dropout: in it.
        """

        states: int = 6
        layers: int = 2
        heads: int = 8
        expansion: int = 2
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("states", "layers", "heads", "expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        check_heads(config.heads, lm)
        self.latents = lm.latents
        self.state_layers = spread(lm.layers + 1, config.states)

    @property
    def states(self) -> int:
        """Those of its layers."""
        return len(self.state_layers)


def spread(count: int, chosen: int) -> tuple[int, ...]:
    """At most `chosen` of `count` numbers from 0 on, evenly spread, the first and the last too."""
    if chosen == 1:
        return (count - 1,)
    return tuple(sorted({round(i * (count - 1) / (chosen - 1)) for i in range(chosen)}))
