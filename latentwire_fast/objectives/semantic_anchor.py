"""A control: latents are drawn to a sentence vector of their text, which says little of it.

Shapes: B texts, M latents, d `d_z`, E the sentence encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.models.encoders.frozen_text import MINILM
from latentwire_fast.models.encoders.truncation import read_tokens
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.mean import mean_vector
from latentwire_fast.models.text_model import TextModel, TextModelStates
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.distances import Form, distances
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.shapes import model_config

MAX_TOKENS = 1024
# Sentence encoders in memory, for all stages that name them: by source.
_loaded: WeakValueDictionary[str, TextModel] = WeakValueDictionary()


class SemanticAnchor(Objective):
    """Distance of the mean of a latent's M vectors, behind a trained linear map, to the vector that
    a frozen sentence encoder has for the text.

    A control that is known to collapse: sentence vectors of like texts are nearly the same, so that
    a constant has most of what there is to gain, and the mean over slots asks nothing of each.
    """

    counted = "texts"
    once = True

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the semantic anchor.

        Attributes:
            source: the sentence encoder: a folder, `package:minilm` or a hub id.
            form: `mse`, the relative squared error; `cosine`, 1 minus the cosine.
        """

        of_latents: ClassVar[bool] = True
        head_fields: ClassVar[tuple[str, ...]] = ("source",)

        source: str = MINILM
        form: Form = "mse"

        def map_sources(self, change: Callable[[str], str]) -> ObjectiveConfig:
            """A copy with the sentence encoder's name changed."""
            changes: dict[str, Any] = {"source": change(self.source)}
            return replace(self, **changes)

    config: Config

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module:
        """The map."""
        assert isinstance(config, SemanticAnchor.Config)
        width = model_config(config.source).get_text_config().hidden_size
        return nn.Linear(model.encoder_config.d_z, width)

    @cached_property
    def anchor(self) -> TextModel:
        """The sentence encoder, loaded when it is first asked for. It is no part of the head: a
        checkpoint does not hold it."""
        source = self.config.source
        found = _loaded.get(source)
        if found is None:
            found = _loaded[source] = TextModel.of(source)
        return found

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The distance, summed over texts."""
        latent_BMd = batch.encoded.sent_BMd
        anchor = self.anchor.to(latent_BMd.device)
        rows = [
            read_tokens(anchor.text, p.item.context, p.question, limit=MAX_TOKENS)
            for p in batch.items
        ]
        with torch.no_grad():
            wanted_BE = mean_vector(TextModelStates(anchor, rows)).float()
        return distances(
            self.head(latent_BMd.mean(1)).float(), wanted_BE, form=self.config.form
        ).sum()
