"""Keys and values: a deep prefix holds what its reader keeps at the positions that were chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.positions import token_ends
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.objectives.token_alignment import move_places
from latentwire_fast.readers.reader import Reader


class KV(Objective):
    """Squared distance of a deep prefix to the reader's own keys and values of the text.

    Relative to their mean square, per layer and per keys or values.
    """

    counted = "texts"
    needs_positions = True

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of keys and values: their weight alone."""

        takes_fewer: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless there are positions, and a prefix that holds keys and values."""
            require(
                run.encoder.selects_positions and run.gives("deep"),
                f"objective {self.kind!r} needs encoder pooler 'selected' and an attachment 'deep'",
            )
            for attachment in run.attachments:
                length = getattr(attachment, "length", None)
                require(
                    attachment.gives != "deep" or length in (None, run.encoder.latents),
                    f"objective {self.kind!r} teaches one position per latent, and attachment "
                    f"{attachment.kind!r} has length={length}; leave the length out",
                )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        if prepared.mode == "pure":
            prepared.text_prompt(reader)
        elif ("text", reader.name) not in prepared.prompts:
            # Without answers behind it, a third of the tokens: the text itself.
            context = prepared.item.context
            prepared.prompt("context", reader, lambda: reader.prompts.build_context(context))
        return 1

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """The reader's keys and values at the chosen positions, fp16."""
        g = reader.kv_geometry
        return 4 * g.layers * g.heads * g.head_width * self.model.slots.count(reader.name)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The mean distance over a text's positions, summed over texts."""
        # Both [L, 2, B, H, P, d_head].
        target_L2BHPD = batch.keys_values(self.places(batch))
        predicted_L2BHPD = cast(Tensor, batch.inputs["deep"])[..., batch.inputs["head"] :, :]
        rms_L2 = torch.tensor(
            batch.model.cards[batch.reader.name].kv.rms, device=target_L2BHPD.device
        )
        error = (predicted_L2BHPD - target_L2BHPD) / rms_L2[:, :, None, None, None, None]
        absent_BP = batch.encoded.pieces.absent_RM(error.shape[4], device=error.device)
        if absent_BP is None:
            return error.pow(2).mean((0, 1, 3, 4, 5)).sum()
        error_BP = error.pow(2).mean((0, 1, 3, 5)).masked_fill(absent_BP, 0)
        return (error_BP.sum(1) / (~absent_BP).sum(1)).sum()

    def places(self, batch: ReaderBatch) -> Tensor:
        """The reader's positions `[B, P]` of each text, one for each of the prefix."""
        start = batch.reader.prompts.content_start
        chosen_BM = batch.encoded.positions.places_BM
        places_BM = start + move_places(chosen_BM, token_ends(batch))
        return batch.model.slots.of(batch.reader.name, places_BM)
