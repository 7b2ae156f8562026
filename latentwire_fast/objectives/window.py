"""The tokens around each chosen position, as its latent alone says.

A deep prefix that learns one reader's keys and values needs of a position what *this* reader holds
there. The testbed's readers hold different halves of a name at a fact's value, so an encoder that
was trained for one of them drops what the other needs. The tokens around a position are of no
reader, and both halves are among them. The loss asks for the missing half and does not teach it
(docs/results.md, "A reader that is added later"): it is kept as what was tried.

Shapes: B texts, T tokens of one, M latents, d `d_z`, K places of a window, W the head's width, D a
reader's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.positions import token_ends
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.objectives.token_alignment import move_places
from latentwire_fast.prompts.builder import Prompt, encoded_text
from latentwire_fast.readers.reader import Reader

_OUTSIDE = -1  # in the place of a token's id


class WindowHead(nn.Module):
    """A latent to one vector for each place of a window, which a reader's output embedding reads a
    token from."""

    def __init__(self, *, d_z: int, d_model: int, width: int, places: int) -> None:
        super().__init__()
        self.places = places
        self.enter = nn.Linear(d_z, places * width)
        self.leave = nn.Linear(width, d_model)
        self.norm = nn.RMSNorm(d_model)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """Vectors `[B, M, K, D]`."""
        hidden_BMKW = self.enter(latent_BMd).unflatten(-1, (self.places, -1))
        vectors_BMKD: Tensor = self.norm(self.leave(nn.functional.gelu(hidden_BMKW)))
        return vectors_BMKD


class Window(Objective):
    """Cross-entropy over a reader's tokens at some places before each chosen position, at the
    position and at some places behind it; each place has a vector of its own.

    Places outside the text are not asked for. The mean over a text's places, summed over texts.
    The head is trained with the model and is no part of it.
    """

    counted = "texts"
    needs_positions = True

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the tokens around a position.

        Attributes:
            before, behind: how many places.
            width: of the head's layer.
        """

        of_latents: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True
        head_fields: ClassVar[tuple[str, ...]] = ("before", "behind", "width")

        before: int = 8
        behind: int = 8
        width: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("width")
            require(
                min(self.before, self.behind) >= 0,
                f"objective {self.kind!r}: before={self.before}, behind={self.behind}, expected at "
                "least 0",
            )

        def check(self, run: RunConfig) -> None:
            """Raise unless there are positions."""
            require(
                run.encoder.selects_positions,
                f"objective {self.kind!r} needs encoder pooler 'selected'",
            )

    config: Config

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module:
        """One for each reader, to its output embedding."""
        assert isinstance(config, Window.Config)
        places = config.before + config.behind + 1
        d_z = model.encoder_config.d_z
        return nn.ModuleDict(
            {
                name: WindowHead(d_z=d_z, d_model=reader.d_model, width=config.width, places=places)
                for name, reader in readers.items()
            }
        )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""

        def text() -> Prompt:
            prompt = Prompt()
            read = encoded_text(prepared.item.context, prepared.question)
            prompt.add(reader.prompts.text_ids(read), content=True)
            return prompt

        if prepared.mode == "pure":
            prepared.text_prompt(reader)  # `token_ends` is of the text with its question then
        prepared.prompt(self.config.kind, reader, text)
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The mean cross-entropy over a text's places, summed over texts."""
        latent_BMd = batch.encoded.sent_BMd
        device = latent_BMd.device
        config = self.config
        places_BM = move_places(batch.encoded.positions.places_BM, token_ends(batch))
        ids = [torch.tensor(prompt.ids) for prompt in batch.prompts(config.kind)]
        ids_BT = pad_sequence(ids, batch_first=True, padding_value=_OUTSIDE).to(device)
        padded_BT = nn.functional.pad(ids_BT, (config.before, config.behind), value=_OUTSIDE)
        window_K = torch.arange(config.before + config.behind + 1, device=device)
        places_BMK = places_BM[..., None] + window_K  # in the padded text
        labels_BMK = padded_BT.gather(1, places_BMK.flatten(1)).view_as(places_BMK)
        asked_BMK = labels_BMK != _OUTSIDE
        absent_BM = batch.encoded.pieces.absent_RM(latent_BMd.shape[1], device=device)
        if absent_BM is not None:
            asked_BMK &= ~absent_BM[..., None]
        share_B = 1 / asked_BMK.sum((1, 2)).clamp(min=1)
        vectors_BMKD = self.reader_head(batch.reader.name)(latent_BMd)
        losses = batch.reader.output_head.losses(
            vectors_BMKD[asked_BMK],
            labels_BMK[asked_BMK],
            label_weights=share_B[:, None, None].expand_as(asked_BMK)[asked_BMK],
        )
        return losses.cross_entropy
