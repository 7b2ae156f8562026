"""Contrast: of the texts of a batch, a latent tells which one is its own.

Shapes: B texts, M latents, d `d_z`, D a reader's width, W the width that both are compared in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader


class ContrastiveHead(nn.Module):
    """Latents and a reader's embeddings to the width that they are compared in."""

    def __init__(self, *, d_z: int, d_model: int, width: int) -> None:
        super().__init__()
        self.latent = nn.Linear(d_z, width)
        self.text = nn.Linear(d_model, width)

    def forward(self, latent_BMd: Tensor, text_BD: Tensor, *, temperature: float) -> Tensor:
        """How well each latent fits each text `[B, B]`, between -1 and 1: the largest cosine of one
        of its M vectors, smoothly."""
        ours_BMW = F.normalize(self.latent(latent_BMd).float(), dim=-1)
        theirs_BW = F.normalize(self.text(text_BD).float(), dim=-1)
        cosines_BMB = ours_BMW @ theirs_BW.T
        largest_BB = (cosines_BMB / temperature).logsumexp(1)
        return temperature * (largest_BB - math.log(latent_BMd.shape[1]))


class Contrastive(Objective):
    """InfoNCE (van den Oord et al. 2018) between latents and pieces of their texts, both ways.

    The other texts of the micro-batch are what a latent has to be told from: smaller micro-batches
    make it easier. A text is a piece of it, drawn anew at each step, as the mean of a reader's
    embeddings. So every part of a text has to leave a trace in its latent. Two views of one text,
    each without another part, would ask for the opposite: a latent that is the same whatever is
    left out.
    """

    counted = "texts"

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the contrast.

        Attributes:
            form: `infonce`; or `margin`, the mean over other texts of how much they fit better than
                the own one less `margin`.
            temperature: of the cosines. margin: of the form `margin`.
            window: how many tokens of a text make a piece.
            width: in which latents and texts are compared.
        """

        of_latents: ClassVar[bool] = True
        head_fields: ClassVar[tuple[str, ...]] = ("width",)

        form: Literal["infonce", "margin"] = "infonce"
        temperature: float = 0.1
        margin: float = 0.2
        window: int = 8
        width: int = 64

        @property
        def compares_texts(self) -> bool:
            """They are what a latent is told from."""
            return True

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("window", "width")
            for name in ("temperature", "margin"):
                value = getattr(self, name)
                require(value > 0, f"objective {self.kind!r}: {name}={value}, expected above 0")

    config: Config

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module:
        """One for each reader, whose embeddings it compares with."""
        assert isinstance(config, Contrastive.Config)
        d_z = model.encoder_config.d_z
        heads = {
            name: ContrastiveHead(d_z=d_z, d_model=reader.d_model, width=config.width)
            for name, reader in readers.items()
        }
        return nn.ModuleDict(heads)

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts; draws the piece of each."""
        ids = prepared.content_prompt(reader).ids

        def piece() -> Prompt:
            last = max(0, len(ids) - self.config.window)
            start = int(torch.randint(last + 1, ()))
            prompt = Prompt()
            prompt.add(ids[start : start + self.config.window], content=True)
            return prompt

        prepared.prompt(self.config.kind, reader, piece)
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The loss, summed over texts; also reports how often the own text fits best."""
        config, latent_BMd = self.config, batch.encoded.sent_BMd
        head = self.reader_head(batch.reader.name)
        text_BD = torch.stack(
            [
                batch.reader.embedding(torch.tensor(prompt.ids, device=batch.reader.device)).mean(0)
                for prompt in batch.prompts(config.kind)
            ]
        )
        text_BD = text_BD.to(latent_BMd) / batch.reader.embedding_rms
        fits_BB = head(latent_BMd, text_BD, temperature=config.temperature)
        names = [prepared.item.context for prepared in batch.items]
        same_BB = torch.tensor([[a == b for b in names] for a in names], device=fits_BB.device)
        own_BB = torch.eye(len(names), dtype=torch.bool, device=fits_BB.device)
        fits_BB = fits_BB.masked_fill(same_BB & ~own_BB, -torch.inf)  # a text twice is no other one
        own_B = torch.arange(len(names), device=fits_BB.device)
        batch.report("contrastive_accuracy", (fits_BB.detach().argmax(1) == own_B).sum())
        if config.form == "margin":
            over_BB = (config.margin + fits_BB - fits_BB.diagonal()[:, None]).clamp(min=0)
            return ((over_BB * ~same_BB).sum(1) / (~same_BB).sum(1).clamp(min=1)).sum()
        logits_BB = fits_BB / config.temperature
        rows, columns = (
            F.cross_entropy(x, own_B, reduction="sum") for x in (logits_BB, logits_BB.T)
        )
        return (rows + columns) / 2
