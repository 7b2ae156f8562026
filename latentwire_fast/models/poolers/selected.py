"""Which positions of a text become latents: those that readers look at when they answer.

A reader needs few of a text's positions. On the testbed, with its view of the text cut down to the
12 of about 42 positions that its answers attend to most, the Llama reader still answers 95% of
the prompts, and the Qwen reader 98% (98% both with all of them). So a latent stands at such a
position, describes what the encoder's LM holds there, and a deep prefix makes keys and values of
it. What attends is a question, which a context-only encoder does not see: a linear score of the
LM's states is trained on the readers' attention instead (`objectives/`).

Shapes: B texts, T positions, D the LM's width, M latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.layers import pre_norm_layer
from latentwire_fast.models.poolers.base import Pooler, Selection
from latentwire_fast.models.token_states import StatesFacts, TokenStates

HEADS, BLOCKS = 4, 2  # of the transformer over the positions


class SelectedPooler(Pooler):
    """Scores positions by the hidden states of all of an LM's layers, and describes the best M.

    All layers, because what a token is stands in the first, and what it belongs to in later ones.
    A transformer over the positions adds what other readers bind to a token and this LM does not:
    where it stands at a fact's value, the testbed's Llama knows the first syllable of the person's
    name and nothing of the second (linear probes: 0.38 and 0.03 of 64), the Qwen reader the
    second and nothing of the first (0.57 and 0.02).
    """

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Positions that answers will look at; a stage with `select` teaches it which. There is
        nothing to set."""

    selects_positions = True
    varies = True

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        self.latents = lm.latents
        states = lm.layers + 1  # the embeddings as well
        self.scores = nn.ModuleList(nn.Linear(lm.width, 1, bias=False) for _ in range(states))
        self.mixes = nn.ModuleList(nn.Linear(lm.width, lm.width, bias=False) for _ in range(states))
        self.body = nn.TransformerEncoder(
            pre_norm_layer(lm.width, HEADS),
            BLOCKS,
            enable_nested_tensor=False,
        )

    @property
    def states(self) -> int:
        """Those of all layers."""
        return len(self.mixes)

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]` of the chosen positions."""
        return self.select(text).states_BMD

    def select(self, text: TokenStates) -> Selection:
        """The chosen positions, and their states."""
        states, is_text_BT = text.all_layers()
        normed = [F.layer_norm(h.float(), h.shape[-1:]) for h in states]
        scores_BT = torch.stack([f(h) for f, h in zip(self.scores, normed, strict=True)]).sum(0)
        scores_BT = scores_BT.squeeze(-1).masked_fill(~is_text_BT, -torch.inf)
        places_BM = best_places(scores_BT.detach(), self.latents, counts_B=text.counts_B)
        mixed = [f(h) for f, h in zip(self.mixes, normed, strict=True)]
        states_BTD = self.body(torch.stack(mixed).sum(0), src_key_padding_mask=~is_text_BT)
        index = places_BM[..., None].expand(-1, -1, states_BTD.shape[-1])
        return Selection(scores_BT, places_BM, states_BTD.gather(1, index))


def best_places(scores_BT: Tensor, count: int, *, counts_B: Tensor | None = None) -> Tensor:
    """The `count` best positions `[B, count]`, ascending; a row with fewer repeats its last.

    Args:
        scores_BT: minus infinity where a position is none, but not in a whole row.
        counts_B: how many positions each row gets, where that differs: from 1 to `count`.
    """
    best, places = scores_BT.topk(min(count, scores_BT.shape[1]))
    real = best > -torch.inf
    if counts_B is not None:
        real &= torch.arange(best.shape[1], device=best.device) < counts_B[:, None]
    last = places.masked_fill(~real, 0).amax(1, keepdim=True)
    places = torch.where(real, places, last).sort(1).values
    return F.pad(places, (0, count - places.shape[1]), mode="replicate")
