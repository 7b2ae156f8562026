"""Learned queries over the tokens of a frozen text encoder.

Shapes: B texts, M latents, D the text encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from latentwire_fast.config.schema import PoolerConfig, RunConfig
from latentwire_fast.models.encoders.frozen_text import FrozenTextEncoder
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.text_model import TextModel
from latentwire_fast.models.token_states import TokenStates
from latentwire_fast.registry import POOLERS


class TokenQueryEncoder(FrozenTextEncoder):
    """A frozen text encoder, and a pooler over its token states: by default learned queries with
    sinusoids and a gate per slot, which keep the order of the text that one vector loses."""

    @dataclass(frozen=True)
    class Config(FrozenTextEncoder.Config):
        """An encoder over the tokens of a frozen text encoder.

        Attributes:
            pooler: its token states to M latents.
        """

        pooler: PoolerConfig = field(default_factory=lambda: POOLERS.config("gated_queries"))

        def __post_init__(self) -> None:
            super().__post_init__()
            self.pooler.check_states_alone(self)

        def check(self, run: RunConfig) -> None:
            """Its pooler checks itself."""
            self.pooler.check(run)

    config: Config

    def __init__(self, text_model: TextModel, config: Config) -> None:
        super().__init__(text_model, config)
        facts = text_model.facts(config.latents)
        self.pooler: Pooler = POOLERS.part_of(config.pooler)(config.pooler, facts)
        self.states_kept = self.pooler.states

    def pool(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        states_BMD: Tensor = self.pooler(text)
        return states_BMD
