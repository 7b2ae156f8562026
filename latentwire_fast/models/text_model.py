"""A frozen text encoder of Hugging Face (BERT, MiniLM, RoBERTa and their like) with its tokenizer.

Shapes: B texts, T positions, W windows, D the model's width, S layers that are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.tensor_cache import TensorCache, digest_of, find_all
from latentwire_fast.models.token_states import StatesFacts, TokenStates
from latentwire_fast.prompts.text_tokens import TextTokenizer
from latentwire_fast.readers.checks import check_vocabulary, position_limit
from latentwire_fast.readers.loading import load_tokenizer, load_weights
from latentwire_fast.readers.shapes import model_config

UNLIMITED = 1_000_000  # what tokenizers without a limit say is more than this


class TextModel(nn.Module):
    """A text encoder whose weights are never trained.

    A text that is longer than the model reads is cut into windows of near equal length, each of
    which is read on its own.

    Args:
        core: the model without a head.
        tokenizer: its tokenizer.
        source: where it comes from, for messages.

    Raises:
        ConfigError: it has a decoder, or no room for a token.
    """

    pretrained_modules: ClassVar[tuple[str, ...]] = ("core",)

    def __init__(self, core: PreTrainedModel, tokenizer: Tokenizer, *, source: str) -> None:
        super().__init__()
        if core.config.is_encoder_decoder:
            raise ConfigError(
                f"{source!r} has a decoder, which has no states of a text; give a model that is an "
                "encoder alone, such as a BERT"
            )
        self.core = core.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.source = source
        self.text = TextTokenizer(tokenizer)
        self._before, self._behind = _special_ids(tokenizer)
        self._window = _length(core, tokenizer) - len(self._before) - len(self._behind)
        if self._window < 1:
            raise ConfigError(f"{source!r} has no position for a text beside its special tokens")

    @classmethod
    def of(cls, source: str) -> TextModel:
        """The model of a folder or a hub id.

        Raises:
            ConfigError: nothing to load there, or not all weights of the model.
        """
        core = load_weights(_TextModels, source, dtype=torch.float32)
        tokenizer = load_tokenizer(source)
        check_vocabulary(tokenizer, core, name=f"text encoder {source!r}")
        return cls(core, tokenizer, source=source)

    @classmethod
    def outline(cls, source: str) -> TextModel:
        """The shape of a model, without its weights. Its tokenizer is another one."""
        core = _fresh(model_config(source))
        return cls(core, load_tokenizer("testbed:llama"), source=source)

    def save(self, folder: Path) -> None:
        """Write the model's configuration and its tokenizer."""
        self.core.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, *, source: str) -> TextModel:
        """The model that was saved in a folder, before its weights are loaded."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return cls(_fresh(config), load_tokenizer(folder), source=source)

    def train(self, mode: bool = True) -> TextModel:
        """It stays in eval mode: a frozen model has nothing to learn from dropout."""
        super().train(mode)
        self.core.eval()
        return self

    def facts(self, latents: int) -> StatesFacts:
        """What a pooler is built for."""
        config = self.core.config
        return StatesFacts(latents, config.hidden_size, config.num_hidden_layers, self.source)

    @torch.no_grad()
    def run(self, rows: Sequence[list[int]], numbers: Sequence[int]) -> list[Tensor]:
        """Hidden states `[S, T, D]` of each row's tokens, without special ones, in these layers."""
        counts = [-(-len(ids) // self._window) for ids in rows]
        windows = [
            ids[i * len(ids) // count : (i + 1) * len(ids) // count]
            for ids, count in zip(rows, counts, strict=True)
            for i in range(count)
        ]
        states_SWTD = self._read(windows, numbers)
        start = len(self._before)
        parts = [states_SWTD[:, w, start : start + len(ids)] for w, ids in enumerate(windows)]
        found = iter(parts)
        return [torch.cat([next(found) for _ in range(count)], 1) for count in counts]

    def _read(self, windows: Sequence[list[int]], numbers: Sequence[int]) -> Tensor:
        """Hidden states `[S, W, T, D]` of windows between the model's special tokens."""
        device = self.core.device
        whole = [torch.tensor([*self._before, *ids, *self._behind]) for ids in windows]
        pad_id = self.tokenizer.pad_token_id or 0
        ids_WT = pad_sequence(whole, batch_first=True, padding_value=pad_id).to(device)
        ones = [torch.ones_like(ids) for ids in whole]
        mask_WT = pad_sequence(ones, batch_first=True).to(device)
        output = self.core(input_ids=ids_WT, attention_mask=mask_WT, output_hidden_states=True)
        return torch.stack([output.hidden_states[i] for i in numbers]).float()


class TextModelStates(TokenStates):
    """A batch of texts before a `TextModel`.

    Args:
        rows: token ids of each text, without special ones.
        cache: of their states; None computes them each time.
    """

    def __init__(
        self, model: TextModel, rows: Sequence[list[int]], *, cache: TensorCache | None = None
    ) -> None:
        self.last_layer = model.core.config.num_hidden_layers
        self._model = model
        self._rows = rows
        self._cache = cache

    def __len__(self) -> int:
        return len(self._rows)

    def layers(self, numbers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Hidden states `[B, T, D]` of these layers, 0 for the embeddings, and a mask `[B, T]` of
        the positions that hold the text, the first of each row."""
        device = self._model.core.device
        rows = [row_STD.transpose(0, 1) for row_STD in self._states(numbers)]
        states_BTSD = pad_sequence(rows, batch_first=True).to(device)
        lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
        is_text_BT = torch.arange(states_BTSD.shape[1], device=device) < lengths_B1
        return list(states_BTSD.unbind(2)), is_text_BT

    def _states(self, numbers: Sequence[int]) -> list[Tensor]:
        if self._cache is None:
            return self._model.run(self._rows, numbers)
        keys = [digest_of([ids, *numbers]) for ids in self._rows]
        return find_all(
            self._cache,
            keys,
            lambda missing: self._model.run([self._rows[i] for i in missing], numbers),
        )


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text."""
    text = "a"
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]


def _length(core: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """How many tokens the model reads at once, special ones included."""
    limit = position_limit(core.config) or UNLIMITED
    for table in core.modules():
        # RoBERTa's positions begin behind that of the padding.
        if isinstance(table, nn.Embedding) and table.num_embeddings == limit:
            limit -= 0 if table.padding_idx is None else table.padding_idx + 1
            break
    return min(limit, tokenizer.model_max_length)


class _TextModels:
    """`AutoModel` without the layer behind the first token, which not every file holds."""

    @staticmethod
    def from_pretrained(path: str | Path, **options: Any) -> Any:
        """A model, or what the options ask for besides it."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return AutoModel.from_pretrained(path, **options, **_without_pooling(config))


def _fresh(config: Any) -> PreTrainedModel:
    """A model of a configuration, before its weights are loaded."""
    model: PreTrainedModel = AutoModel.from_config(
        config, dtype=torch.float32, trust_remote_code=False, **_without_pooling(config)
    )
    return model


def _without_pooling(config: Any) -> dict[str, bool]:
    """Options that leave out that layer, of a model that may have one."""
    kind: Any = MODEL_MAPPING.get(type(config), None)
    known = () if kind is None else inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}
