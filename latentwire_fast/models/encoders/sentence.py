"""A frozen sentence encoder: one vector per text, which learned queries spread over the latents.

One vector has no order and few details: answers that need a name out of a long text are lost in it.
It is here to be compared with `token_query`, which reads the same model's tokens.

Shapes: B texts, M latents, D the sentence encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latentwire_fast.models.encoders.frozen_text import FrozenTextEncoder
from latentwire_fast.models.poolers.mean import SlotQueries, mean_vector
from latentwire_fast.models.text_model import TextModel
from latentwire_fast.models.token_states import TokenStates


class SentenceEncoder(FrozenTextEncoder):
    """The mean of a frozen text encoder's token states (as MiniLM makes its sentence vectors), and
    M learned queries that each take their part of it."""

    @dataclass(frozen=True)
    class Config(FrozenTextEncoder.Config):
        """A frozen sentence encoder; nothing else to set."""

    config: Config

    def __init__(self, text_model: TextModel, config: Config) -> None:
        super().__init__(text_model, config)
        self.queries = SlotQueries(config.latents, text_model.facts(config.latents).width)

    def pool(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        states_BMD: Tensor = self.queries(mean_vector(text))
        return states_BMD
