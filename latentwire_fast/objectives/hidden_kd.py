"""Distillation of hidden states: with the latent a reader computes what it computes with the
text, in chosen layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.distances import Form, distances
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader


class HiddenKD(Objective):
    """Distance of a reader's hidden states behind the latent to those behind the text, where they
    predict the answers' tokens; the mean over the chosen layers.

    The squared error is relative to the mean square of each of the text's states: a few positions
    of an LM have states that are a hundred times larger than others, and would be all that counts.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the distillation of hidden states.

        Attributes:
            layers: their numbers: 0 is what the first layer reads, 1 what it gives; negative ones
                count from the end, -1 are the last hidden states.
            form: `mse`, the relative squared error; `cosine`, 1 minus the cosine.
            tokens: how many tokens of each answer count; None: all of them and EOS.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        layers: tuple[int, ...] = (-1,)
        form: Form = "mse"
        tokens: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("tokens")
            require(
                0 < len(self.layers) == len(set(self.layers)),
                f"objective {self.kind!r}: layers={self.layers}, expected one number at least, "
                "each once",
            )

    config: Config

    @property
    def layers(self) -> tuple[int, ...]:
        """Those of its settings."""
        return self.config.layers

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens.

        Raises:
            ConfigError: the reader has no such layer.
        """
        last = reader.model.config.get_text_config(decoder=True).num_hidden_layers
        for number in self.config.layers:
            require(
                -last - 1 <= number <= last,
                f"objective {self.config.kind!r}: layers={self.config.layers}, and reader "
                f"{reader.name!r} has {last} layers; give numbers from {-last - 1} to {last}",
            )
        prepared.text_prompt(reader)
        return count_targets(prepared.latent_prompt(reader), self.config.tokens)

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """The teacher's states in these layers, fp16."""
        count = count_targets(prepared.text_prompt(reader))
        return 2 * reader.d_model * count * len(self.config.layers)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The distance, summed over tokens."""
        counts_N = batch.answers.first_N(self.config.tokens)
        found = []
        for number in self.config.layers:
            ours_ND = batch.answers.layers[number][counts_N].float()
            theirs_ND = batch.teacher_layers[number].to(ours_ND)[counts_N]
            found.append(distances(ours_ND, theirs_ND, form=self.config.form).sum())
        return torch.stack(found).mean()
