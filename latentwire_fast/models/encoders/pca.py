"""Principal components of a frozen LM's states: the best linear map to d_z that no gradient made.

It keeps most of the variance of what the LM holds, which is not most of what a reader needs (the
seeds' log: 25% of the variance, and F1 1.8). So it is a baseline for every trained projection, and
a place to start one from.

Shapes: B texts, T positions, M latents, D the LM's width, N vectors that are fitted to, d `d_z`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import Texts, rms_normalize
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.lm_text import LMFacts
from latentwire_fast.models.principal_axes import Moments, PrincipalAxes
from latentwire_fast.models.token_states import OneLayer, TokenStates
from latentwire_fast.registry import POOLERS

logger = logging.getLogger(__name__)

BATCH = 16  # texts that are read at a time while it is fitted


class PCAEncoder(LMEncoder):
    """The encoder `lm` with principal components in the place of its projection.

    They are those of states after the LayerNorm before the projection (each vector with mean 0 and
    RMS 1): a few of an LM's vectors are a hundred times as long as the others, and would be all
    that the axes show.

    Args: those of `LMEncoder`.
    """

    @dataclass(frozen=True)
    class Config(LMEncoder.Config):
        """Principal components of an LM's states, fitted to training texts when a run begins.

        Attributes:
            pooler: what is made of the states before they are projected.
            frozen: keep the LM's weights.
            use: keep the components as they are (`frozen`), train on from them (`start`), or keep
                them and train what is added to them (`hybrid`).
            layer: whose states they are: 0 for the embeddings; None for the last. A pooler then
                sees these alone, and nothing of the template around the text.
            fit_on: what a fresh pooler makes of the texts (M vectors each), or the states of their
                single tokens.
            fit_texts: how many training texts they are fitted to.
            whiten: bring all components to one variance; else they keep their own.
            hidden: inner width of what is added.
        """

        pooler: PoolerConfig = field(default_factory=lambda: POOLERS.config("spans"))
        frozen: bool = True
        use: Literal["frozen", "start", "hybrid"] = "frozen"
        layer: int | None = None
        fit_on: Literal["slots", "tokens"] = "slots"
        fit_texts: int = 1000
        whiten: bool = False
        hidden: int = 256

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("fit_texts", "hidden")
            require(
                self.layer is None or self.layer >= 0, f"layer={self.layer}, expected 0 or above"
            )
            require(
                self.frozen or self.use == "start",
                f"encoder {self.kind!r}: use={self.use!r} keeps components of the LM's states, "
                "which frozen=False would change; take use='start', or frozen=True",
            )
            require(
                self.layer is None or not self.pooler.needs_lm,
                f"encoder {self.kind!r}: layer={self.layer}, and pooler {self.pooler.kind!r} runs "
                "all of the LM; leave out layer, or take another pooler",
            )

        @property
        def texts_to_fit(self) -> int:
            """As `fit_texts` says."""
            return self.fit_texts

    config: Config

    def __init__(
        self,
        core: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        *,
        shared: bool = False,
        facts: LMFacts | None = None,
    ) -> None:
        super().__init__(core, tokenizer, config, shared=shared, facts=facts)
        width, is_kept = self.project.in_features, config.use != "start"
        if config.d_z > width:
            raise ConfigError(
                f"d_z={config.d_z}, and the states of {config.source!r} have {width} components; "
                "take fewer, or another LM"
            )
        self.norm.requires_grad_(not is_kept)
        self.project.requires_grad_(not is_kept)
        self.added: nn.Sequential | None = None
        if config.use == "hybrid":
            last = nn.Linear(config.hidden, config.d_z)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.added = nn.Sequential(nn.Linear(width, config.hidden), nn.SiLU(), last)
        self.shares_d: Tensor
        self.fitted: Tensor
        self.register_buffer("shares_d", torch.zeros(config.d_z))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))

    def facts_for_pooler(self, lm: LMFacts) -> LMFacts:
        """Those of an LM of one layer, where one is chosen."""
        layer = self.config.layer
        if layer is None:
            return lm
        require(
            layer <= lm.layers,
            f"layer={layer}, and {lm.source!r} has {lm.layers} layers; take one of them, or none "
            "for the last",
        )
        return replace(lm, layers=0)

    @torch.no_grad()
    def fit(self, contexts: Texts, questions: Texts | None = None) -> None:
        """Take the components of these texts' states.

        Raises:
            DataError: the texts have too few.
        """
        moments = Moments(self.project.in_features, device=self.project.weight.device)
        was_training = self.training
        self.eval()
        for start in range(0, len(contexts), BATCH):
            rows = slice(start, start + BATCH)
            text = self._text(contexts[rows], None if questions is None else questions[rows])
            moments.add(self.norm(self._vectors(text).float()))
        self.train(was_training)
        self._take(moments.axes(self.config.d_z))
        logger.info(
            "PCA: %d components hold %.1f%% of the variance of %s vectors of %d texts (%s)",
            self.config.d_z,
            100 * float(self.shares_d.sum()),
            f"{moments.count:,}",
            len(contexts),
            ", ".join(f"{100 * share:.1f}%" for share in self.shares_d[:8].tolist()),
        )

    def _vectors(self, text: TokenStates) -> Tensor:
        """The states `[N, D]` that are fitted to."""
        if self.config.fit_on == "slots":
            return self.pooler(text).flatten(0, 1)
        states_BTD, is_text_BT = text.last()
        return states_BTD[is_text_BT.to(states_BTD.device)]

    def _take(self, axes: PrincipalAxes) -> None:
        """Make these the projection, whose values have a mean square of about 1."""
        scale_d = 1 / axes.spread_k() if self.config.whiten else None
        if scale_d is None:
            size = float(axes.variances_k.mean().sqrt()) or 1.0
            scale_d = torch.full_like(axes.variances_k, 1 / size)
        weight_dD = axes.axes_kD * scale_d[:, None]
        self.project.weight.copy_(weight_dD)
        self.project.bias.copy_(-weight_dD @ axes.mean_D)
        self.shares_d.copy_(axes.shares_k)
        self.fitted.fill_(axes.vectors)

    def facts(self) -> dict[str, Any]:
        """What the components hold of the variance of what they were fitted to."""
        return {
            "explained_variance": float(self.shares_d.sum()),
            "by_component": self.shares_d.tolist(),
            "vectors": int(self.fitted),
        }

    def _text(self, contexts: Texts, questions: Texts | None) -> TokenStates:
        text, layer = super()._text(contexts, questions), self.config.layer
        return text if layer is None else TextOfLayer(text, layer)

    def _latent(self, states_BMD: Tensor) -> Tensor:
        normed_BMD = self.norm(states_BMD.float())
        latent_BMd = self.project(normed_BMD)
        if self.added is not None:
            latent_BMd = latent_BMd + self.added(normed_BMD)
        return rms_normalize(latent_BMd.float())


class TextOfLayer(OneLayer):
    """The states of a text in one layer of an LM, where they are of the text itself."""

    def __init__(self, text: TokenStates, layer: int) -> None:
        (states_BTD,), is_text_BT = text.layers([layer])
        super().__init__(states_BTD, is_text_BT)

    def hidden(self) -> tuple[Tensor, Tensor]:
        """The states `[B, T, D]` from the text's first on, and how many there are of each `[B]`."""
        states_BTD, is_text_BT = self.last()
        column_1T = torch.arange(states_BTD.shape[1], device=is_text_BT.device)[None]
        first_B1 = is_text_BT.int().argmax(1, keepdim=True)
        column_BT = (column_1T + first_B1).clamp(max=states_BTD.shape[1] - 1)
        index = column_BT[..., None].expand(-1, -1, states_BTD.shape[2])
        return states_BTD.gather(1, index.to(states_BTD.device)), is_text_BT.sum(1)
