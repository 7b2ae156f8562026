"""Reconstruction: a small decoder gives back a reader's embeddings of the text from the latent.

Shapes: B texts, T places of a text, M latents, d `d_z`, W the decoder's width, D a reader's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.layers import pre_norm_decoder_layer
from latentwire_fast.models.poolers.gated_queries import sinusoids
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.distances import Form, distances
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader


class PlaceDecoder(nn.Module):
    """What stands at some places of a text: a query for each place, which knows its number, reads
    the latent."""

    def __init__(self, *, d_z: int, d_model: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(d_z, width)
        self.body = nn.ModuleList(pre_norm_decoder_layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, d_model)

    def forward(self, latent_BMd: Tensor, places_BT: Tensor, is_place_BT: Tensor) -> Tensor:
        """Vectors `[B, T, D]` for these places."""
        width = self.norm.normalized_shape[0]
        count = max(latent_BMd.shape[1], int(places_BT.max()) + 1)
        numbers_KW = sinusoids(count, width).to(latent_BMd)
        memory_BMW = self.enter(latent_BMd) + numbers_KW[: latent_BMd.shape[1]]
        states_BTW = numbers_KW[places_BT]
        for layer in self.body:
            states_BTW = layer(states_BTW, memory_BMW, tgt_key_padding_mask=~is_place_BT)
        decoded_BTD: Tensor = self.leave(self.norm(states_BTW))
        return decoded_BTD


class Reconstruct(Objective):
    """Distance of what a decoder makes of the latent to a reader's embeddings of the text's tokens.

    The decoder is trained with the model and is no part of it. The embeddings are divided by the
    root mean square of the reader's table: what is decoded is of size 1 for every reader.
    """

    counted = "embeddings"

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the reconstruction.

        Attributes:
            form: `cosine`, 1 minus the cosine; `mse`, the relative squared error.
            tokens: how many of a text's tokens are decoded at most; of a longer one, so many at
                even distances.
            width, layers, heads: of the decoder.
        """

        of_latents: ClassVar[bool] = True
        head_fields: ClassVar[tuple[str, ...]] = ("width", "layers", "heads")

        form: Form = "cosine"
        tokens: int = 64
        width: int = 64
        layers: int = 1
        heads: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("tokens", "width", "layers", "heads")
            require(
                self.width % self.heads == 0 == self.width % 2,
                f"objective {self.kind!r}: width={self.width}, expected an even number that "
                f"divides among heads={self.heads}",
            )

    config: Config

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module:
        """A decoder for each reader, to its embeddings."""
        assert isinstance(config, Reconstruct.Config)
        shape = {"width": config.width, "layers": config.layers, "heads": config.heads}
        d_z = model.encoder_config.d_z
        return nn.ModuleDict(
            {
                name: PlaceDecoder(d_z=d_z, d_model=reader.d_model, **shape)
                for name, reader in readers.items()
            }
        )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts embeddings."""
        return min(self.config.tokens, len(prepared.content_prompt(reader).ids))

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The distance, summed over embeddings."""
        latent_BMd = batch.encoded.sent_BMd
        device = latent_BMd.device
        rows = [prompt.ids for prompt in batch.prompts("content")]
        places = [self._places(len(ids)) for ids in rows]
        places_BT = pad_sequence(places, batch_first=True).to(device)
        lengths_B1 = torch.tensor([[len(row)] for row in places], device=device)
        is_place_BT = torch.arange(places_BT.shape[1], device=device) < lengths_B1
        decoded_BTD = self.reader_head(batch.reader.name)(latent_BMd, places_BT, is_place_BT)
        kept = [torch.tensor(ids)[at] for ids, at in zip(rows, places, strict=True)]
        wanted_ND = batch.reader.embedding(torch.cat(kept).to(batch.reader.device))
        wanted_ND = wanted_ND.to(device).float() / batch.reader.embedding_rms
        return distances(decoded_BTD[is_place_BT].float(), wanted_ND, form=self.config.form).sum()

    def _places(self, length: int) -> Tensor:
        """Numbers of the tokens that are decoded, of a text of so many."""
        count = min(self.config.tokens, length)
        return torch.arange(count) * length // count
