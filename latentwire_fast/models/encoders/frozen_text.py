"""What the encoders over a frozen text encoder have in common: `sentence` and `token_query`.

Shapes: B texts, M latents, D the text encoder's width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import EncoderConfig
from latentwire_fast.files.tensor_cache import TensorCache
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.encoders.base import Encoder, Limit, Texts, rms_normalize
from latentwire_fast.models.encoders.truncation import read_tokens
from latentwire_fast.models.text_model import TextModel, TextModelStates
from latentwire_fast.models.token_states import TokenStates
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.readers.reader import Reader

FOLDER = "encoder"  # of a saved model: the text encoder's configuration and tokenizer
MINILM = "package:minilm"


class FrozenTextEncoder(Encoder):
    """A frozen text encoder reads the text; what a subclass adds makes M states of what it holds.

    Args:
        text_model: the frozen one.

    Attributes:
        states_kept: how many of its layers are read.
    """

    @dataclass(frozen=True)
    class Config(EncoderConfig):
        """Settings of every encoder over a frozen text encoder.

        Attributes:
            text_encoder: a folder, `package:minilm` or a hub id.
            max_tokens: longest text that is read.
        """

        text_encoder: str = MINILM
        max_tokens: int = 1024

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("max_tokens")

        def map_sources(self, change: Callable[[str], str]) -> EncoderConfig:
            """A copy with the text encoder's name changed."""
            return replace(self, text_encoder=change(self.text_encoder))

    config: Config
    states_kept = 1

    def __init__(self, text_model: TextModel, config: Config) -> None:
        super().__init__(config)
        self.text_model = text_model
        width = text_model.core.config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.d_z)
        self.states_cache: TensorCache | None = None  # while it is trained

    @abstractmethod
    def pool(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""

    @classmethod
    def build(cls, config: EncoderConfig, readers: Mapping[str, Reader]) -> FrozenTextEncoder:
        """A fresh encoder over the text encoder of its source."""
        assert isinstance(config, FrozenTextEncoder.Config)
        return cls(TextModel.of(config.text_encoder), config)

    @classmethod
    def outline(cls, config: EncoderConfig) -> FrozenTextEncoder:
        """An encoder whose text encoder has the shape of its source, and no weights."""
        assert isinstance(config, FrozenTextEncoder.Config)
        with torch.device("meta"):
            return cls(TextModel.outline(config.text_encoder), config)

    @property
    def limit(self) -> Limit:
        """In tokens."""
        return Limit("max_tokens", self.config.max_tokens, "tokens")

    def length_of(self, text: str) -> int:
        """Its tokens."""
        return len(self.text_model.text.ids(text))

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32 of contexts, or of contexts with questions (pure mode)."""
        asked = [None] * len(contexts) if questions is None else questions
        text, limit = self.text_model.text, self.config.max_tokens
        rows = [read_tokens(text, c, q, limit=limit) for c, q in zip(contexts, asked, strict=True)]
        states_BMD = self.pool(TextModelStates(self.text_model, rows, cache=self.states_cache))
        return rms_normalize(self.project(self.norm(states_BMD.float())).float())

    def keep_states(self, folder: Path, *, rank: int) -> None:
        """Keep the text encoder's states."""
        digest = parameter_digest(self.text_model.core.named_parameters())
        self.states_cache = TensorCache(folder / f"encoder-{digest[:16]}-{rank}")

    def kept_bytes(self, context: str) -> int:
        """Its states, fp16."""
        tokens = min(self.length_of(encoded_text(context, None)), self.config.max_tokens)
        return 2 * self.states_kept * tokens * self.norm.normalized_shape[0]

    def save(self, folder: Path) -> list[str]:
        """Write the text encoder's configuration and its tokenizer."""
        self.text_model.save(folder / FOLDER)
        return [f"{FOLDER}/{path.name}" for path in sorted((folder / FOLDER).iterdir())]

    @classmethod
    def load(cls, folder: Path, config: EncoderConfig) -> FrozenTextEncoder:
        """The encoder that was saved in a folder, before its weights are loaded."""
        assert isinstance(config, FrozenTextEncoder.Config)
        return cls(TextModel.load(folder / FOLDER, source=config.text_encoder), config)
