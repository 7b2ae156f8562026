"""Token embeddings of an LM, guided by a frozen sentence encoder (the anchor).

With its default pooler, one mean vector per text, this is the design whose latents became alike
(pairwise cosine 0.999): a control. Another pooler keeps the tokens apart.

Shapes: B texts, T positions of the LM's tokens, S of the anchor's, D the width in between, M
latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import EncoderConfig, PoolerConfig, RunConfig
from latentwire_fast.files.tensor_cache import TensorCache
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.encoders.base import Encoder, Limit, Texts, rms_normalize
from latentwire_fast.models.encoders.frozen_text import MINILM
from latentwire_fast.models.encoders.truncation import read_tokens
from latentwire_fast.models.layers import pre_norm_decoder_layer
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.gated_queries import sinusoids
from latentwire_fast.models.text_model import TextModel, TextModelStates
from latentwire_fast.models.token_states import OneLayer, StatesFacts
from latentwire_fast.prompts.text_tokens import TextTokenizer
from latentwire_fast.readers.checks import check_vocabulary
from latentwire_fast.readers.embeddings import input_embedding, plain_embedding
from latentwire_fast.readers.loading import load_tokenizer, load_weights
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.shapes import model_config
from latentwire_fast.registry import POOLERS

FOLDER = "encoder"  # of a saved model: tokenizer and table size of the LM, and the anchor
TABLE = "embedding.json"


class AnchorGuidedEncoder(Encoder):
    """A transformer over an LM's frozen token embeddings, which attends to a frozen text encoder's
    states of the same text; then a pooler.

    Args:
        embedding: the LM's, frozen.
        tokenizer: the LM's.
        anchor: the text encoder.
    """

    @dataclass(frozen=True)
    class Config(EncoderConfig):
        """An encoder on token embeddings with a frozen sentence encoder as its anchor.

        Attributes:
            source: the LM whose token embeddings are read: a reader's source, a folder or a hub id.
            anchor: the text encoder: a folder, `package:minilm` or a hub id.
            width, layers, heads: of the transformer.
            pooler: its states to M latents.
            max_tokens: longest text that is read, in the LM's tokens and in the anchor's.
        """

        source: str = "testbed:llama"
        anchor: str = MINILM
        width: int = 128
        layers: int = 2
        heads: int = 4
        pooler: PoolerConfig = field(default_factory=lambda: POOLERS.config("mean"))
        max_tokens: int = 1024

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("width", "layers", "heads", "max_tokens")
            require(
                self.width % self.heads == 0,
                f"width={self.width} does not divide among heads={self.heads}",
            )
            self.pooler.check_states_alone(self)

        def check(self, run: RunConfig) -> None:
            """Its pooler checks itself."""
            self.pooler.check(run)

        def map_sources(self, change: Callable[[str], str]) -> EncoderConfig:
            """A copy with both names changed."""
            return replace(self, source=change(self.source), anchor=change(self.anchor))

    config: Config

    def __init__(
        self, embedding: nn.Embedding, tokenizer: Tokenizer, anchor: TextModel, config: Config
    ) -> None:
        super().__init__(config)
        width = config.width
        self.embedding = embedding.requires_grad_(False)
        self.tokenizer = tokenizer
        self.text = TextTokenizer(tokenizer)
        self.anchor = anchor
        self.enter = nn.Linear(embedding.embedding_dim, width)
        self.enter_anchor = nn.Linear(anchor.core.config.hidden_size, width)
        self.body = nn.ModuleList(
            pre_norm_decoder_layer(width, config.heads) for _ in range(config.layers)
        )
        facts = StatesFacts(config.latents, width, layers=0, source=f"encoder {config.kind!r}")
        self.pooler: Pooler = POOLERS.part_of(config.pooler)(config.pooler, facts)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.d_z)
        self.states_cache: TensorCache | None = None  # of the anchor, while it is trained

    @classmethod
    def build(cls, config: EncoderConfig, readers: Mapping[str, Reader]) -> AnchorGuidedEncoder:
        """A fresh encoder with the token embeddings of its source, a reader's where one has it."""
        assert isinstance(config, AnchorGuidedEncoder.Config)
        reader = next((r for r in readers.values() if r.source == config.source), None)
        if reader is None:
            core = load_weights(AutoModel, config.source, dtype=torch.float32)
            tokenizer = load_tokenizer(config.source)
            check_vocabulary(tokenizer, core, name=f"encoder LM {config.source!r}")
        else:
            core, tokenizer = reader.model, reader.tokenizer
        table = plain_embedding(input_embedding(core))
        return cls(table, tokenizer, TextModel.of(config.anchor), config)

    @classmethod
    def outline(cls, config: EncoderConfig) -> AnchorGuidedEncoder:
        """An encoder of the shapes of its source and its anchor, without weights."""
        assert isinstance(config, AnchorGuidedEncoder.Config)
        lm = model_config(config.source).get_text_config()
        with torch.device("meta"):
            table = nn.Embedding(lm.vocab_size, lm.hidden_size)
            anchor = TextModel.outline(config.anchor)
            return cls(table, load_tokenizer("testbed:llama"), anchor, config)

    @property
    def limit(self) -> Limit:
        """In the LM's tokens."""
        return Limit("max_tokens", self.config.max_tokens, "tokens")

    def length_of(self, text: str) -> int:
        """Its tokens, of the LM."""
        return len(self.text.ids(text))

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32 of contexts, or of contexts with questions (pure mode)."""
        asked = [None] * len(contexts) if questions is None else questions
        pairs = list(zip(contexts, asked, strict=True))
        states_BTD, is_text_BT = self._embed(pairs)
        memory_BSD, is_text_BS = self._anchor(pairs)
        for layer in self.body:
            states_BTD = layer(
                states_BTD,
                memory_BSD,
                tgt_key_padding_mask=~is_text_BT,
                memory_key_padding_mask=~is_text_BS,
            )
        pooled_BMD = self.pooler(OneLayer(states_BTD, is_text_BT))
        return rms_normalize(self.project(self.norm(pooled_BMD.float())).float())

    def _rows(self, text: TextTokenizer, pairs: list[tuple[str, str | None]]) -> list[list[int]]:
        return [read_tokens(text, c, q, limit=self.config.max_tokens) for c, q in pairs]

    def _embed(self, pairs: list[tuple[str, str | None]]) -> tuple[Tensor, Tensor]:
        """The LM's token embeddings at the transformer's width `[B, T, D]`, and a mask `[B, T]` of
        the tokens."""
        device = self.norm.weight.device
        rows = [torch.tensor(ids, device=device) for ids in self._rows(self.text, pairs)]
        ids_BT = pad_sequence(rows, batch_first=True)
        lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
        is_text_BT = torch.arange(ids_BT.shape[1], device=device) < lengths_B1
        table_BTE = self.embedding(ids_BT).float()
        states_BTD = self.enter(F.layer_norm(table_BTE, table_BTE.shape[-1:]))
        places_TD = sinusoids(ids_BT.shape[1], states_BTD.shape[-1]).to(states_BTD)
        return states_BTD + places_TD, is_text_BT

    def _anchor(self, pairs: list[tuple[str, str | None]]) -> tuple[Tensor, Tensor]:
        """The anchor's states at that width `[B, S, D]`, and a mask `[B, S]` of its tokens."""
        rows = self._rows(self.anchor.text, pairs)
        found = TextModelStates(self.anchor, rows, cache=self.states_cache)
        states_BSE, is_text_BS = found.last()
        return self.enter_anchor(F.layer_norm(states_BSE, states_BSE.shape[-1:])), is_text_BS

    def keep_states(self, folder: Path, *, rank: int) -> None:
        """Keep the anchor's states."""
        digest = parameter_digest(self.anchor.core.named_parameters())
        self.states_cache = TensorCache(folder / f"encoder-{digest[:16]}-{rank}")

    def kept_bytes(self, context: str) -> int:
        """The anchor's states, fp16."""
        (ids,) = self._rows(self.anchor.text, [(context, None)])
        return 2 * len(ids) * self.enter_anchor.in_features

    def save(self, folder: Path) -> list[str]:
        """Write the LM's tokenizer and the size of its table, and the anchor's configuration and
        tokenizer."""
        place = folder / FOLDER
        self.tokenizer.save_pretrained(place / "lm")
        self.anchor.save(place / "anchor")
        size = {"rows": self.embedding.num_embeddings, "width": self.embedding.embedding_dim}
        (place / TABLE).write_text(json.dumps(size) + "\n")
        files = sorted(path for path in place.rglob("*") if path.is_file())
        return [str(path.relative_to(folder)) for path in files]

    @classmethod
    def load(cls, folder: Path, config: EncoderConfig) -> AnchorGuidedEncoder:
        """The encoder that was saved in a folder, before its weights are loaded."""
        assert isinstance(config, AnchorGuidedEncoder.Config)
        place = folder / FOLDER
        size = json.loads((place / TABLE).read_text())
        anchor = TextModel.load(place / "anchor", source=config.anchor)
        table = nn.Embedding(size["rows"], size["width"])
        return cls(table, load_tokenizer(place / "lm"), anchor, config)
