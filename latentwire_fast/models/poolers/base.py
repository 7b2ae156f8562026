"""The base class of poolers.

Shapes: B texts, T positions, M latents, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.token_states import StatesFacts, TokenStates


@dataclass(frozen=True)
class Selection:
    """Positions of a batch of texts.

    Attributes:
        scores_BT: of every position, minus infinity where none may be chosen.
        places_BM: the chosen ones, ascending. Where a text gets fewer than M, its last is repeated
            in the place of the others.
        states_BMD: what the pooler makes of them.
    """

    scores_BT: Tensor
    places_BM: Tensor
    states_BMD: Tensor


class Pooler(nn.Module):
    """Texts before an encoder to M states each. It asks for the passes that it needs.

    Args:
        config: its settings.
        lm: of the encoder that reads the texts, an LM mostly.

    Attributes:
        selects_positions: whether it takes the states of some positions of the text, and `select`
            says which.
        varies: whether it can make fewer than M latents of a text (`TokenStates.counts_B`). What
            it gives in the place of the others is of no account.
        needs_lm: whether it runs a causal LM on more than the texts (`LMText`).
    """

    Config: ClassVar[type[PoolerConfig]] = PoolerConfig
    selects_positions: ClassVar[bool] = False
    varies: ClassVar[bool] = False
    needs_lm: ClassVar[bool] = False

    def __init__(self, config: PoolerConfig, lm: StatesFacts) -> None:
        super().__init__()
        self.config = config

    @property
    def states(self) -> int:
        """How many layers' states of the text alone it reads, which can be kept if the LM is
        frozen; 0 if it runs the LM on more than the text."""
        return 0

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        raise NotImplementedError

    def select(self, text: TokenStates) -> Selection:
        """States `[B, M, D]` and the positions that they are of.

        Raises:
            ConfigError: this pooler selects none.
        """
        raise ConfigError(f"pooler {self.config.kind!r} selects no positions")
