"""Learned tokens behind the text, whose last hidden states become the latents (the in-context
autoencoder of ICAE, arXiv:2307.06945).

Shapes: B texts, M latents, D the LM's width, V its vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.lm_text import LMFacts, LMText
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.token_states import TokenStates
from latentwire_fast.readers.embeddings import expected_embedding
from latentwire_fast.readers.logits import LogitTransform


class QueriesPooler(Pooler):
    """M learned queries behind the text.

    With `rehearsals`, queries first say what the LM would say: each pass gives every query the
    distribution that its predecessor came to, as an expected embedding, so that after r passes the
    first r tokens are what greedy decoding would write (Jacobi iteration; no gradient). The encoder
    then starts from all that the LM knows, not from its next token alone: with 3 passes the Llama
    reader was at its text score after 210 steps, without at a third of it.

    Raises:
        ConfigError: rehearsals with an LM that has another table for its outputs than for its
            inputs: the LM is loaded without that one.
    """

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Learned tokens after the text.

        Attributes:
            rehearsals: passes in which the queries first take in what the LM would say next.
        """

        rehearsals: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.rehearsals >= 0, f"rehearsals={self.rehearsals}, expected at least 0")

    needs_lm = True
    varies = True  # a query does not see those behind it: the first ones are the same without them
    table_parameters: ClassVar[tuple[str, ...]] = ("memory", "query_offsets")

    def __init__(self, config: Config, lm: LMFacts) -> None:
        super().__init__(config, lm)
        # Queries that start as the anchor's last token already hold the LM's idea of an answer.
        noise_MD = torch.randn(lm.latents, lm.width, device=lm.anchor_D.device) * (
            0.3 * lm.embedding_std
        )
        self.memory = nn.Parameter(lm.anchor_D + noise_MD)
        self.rehearsals, self.logits = config.rehearsals, lm.logits
        if config.rehearsals:
            if not lm.tied:
                raise ConfigError(
                    f"encoder.pooler.rehearsals={config.rehearsals} needs an encoder LM with tied "
                    f"embeddings, and the output embeddings of {lm.source!r} are not its input "
                    "embeddings: give another LM (--encoder), or set rehearsals to 0 in a file "
                    "that --print-config writes"
                )
            self.query_offsets = nn.Parameter(torch.zeros(lm.latents, lm.width))

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`: the last hidden states of the queries."""
        assert isinstance(text, LMText), "an encoder without an LM has a pooler with `needs_lm`"
        queries_BMD = self.memory.expand(len(text), -1, -1)
        for _ in range(self.rehearsals):
            with torch.no_grad():
                hidden_BMD = text.read_queries(queries_BMD)
                expected_BMD = expected_embeddings(hidden_BMD[:, :-1], text.embedding, self.logits)
            queries_BMD = torch.cat([queries_BMD[:, :1], expected_BMD], 1) + self.query_offsets
        return text.read_queries(queries_BMD)


def expected_embeddings(
    hidden_BMD: Tensor, embedding: nn.Embedding, logits: LogitTransform
) -> Tensor:
    """Mean embedding `[B, M, D]` of the tokens that hidden states predict.

    The output embedding is the table itself; what an LM reads is what the module makes of it.
    """
    probs_BMV = logits(hidden_BMD @ embedding.weight.T).softmax(-1)
    return expected_embedding(probs_BMV, embedding)
