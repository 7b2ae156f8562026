"""One frozen LLM that answers from text or from a latent prefix.

Shapes: B rows, T positions, D `d_model`, V vocabulary, N scored answer tokens, M prefix positions;
a deep prefix is `[L, 2, B or 1, H, P, d_head]` (see `prefix.py`).

    reader = Reader.load("path/or/hub-id", name="llama")
    prompt = reader.prompts.build([Turn("Who?")], context="...", latent="context")
    reader.generate([prompt], prefixes=[prefix_MD])
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.config.schema import ReaderConfig
from latentwire_fast.errors import DataError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.prompts.batch import PaddingSide, PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt, PromptBuilder, Turn
from latentwire_fast.readers.checks import check_logits, check_vocabulary, learns_positions
from latentwire_fast.readers.decoding import DecodeOptions, pick_tokens
from latentwire_fast.readers.kv_cache import CacheFiller, decoder_layers, training_cache
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.loading import load_tokenizer, load_weights, nf4_config

logger = logging.getLogger(__name__)


class Reader:
    """A frozen causal LM, its tokenizer and its prompt builder.

    Args:
        model: any Hugging Face causal LM whose logits are its output embedding applied to the last
            hidden state (checked). It is put into eval mode and frozen.
        tokenizer: its tokenizer.
        name: the key of this reader in adapters, metrics and reports.
        anchor, bos: passed to `PromptBuilder`.

    Raises:
        ConfigError: the model post-processes its logits, or the tokenizer lacks an EOS or has
            tokens that the model does not know.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        name: str,
        source: str = "",
        anchor: str = "Answer:",
        bos: bool | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.prompts = PromptBuilder(tokenizer, anchor=anchor, bos=bos)
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id >= len(self.embedding.weight):
            self.pad_id = self.prompts.eos_id
        check_vocabulary(tokenizer, model, name=f"reader {name!r}")
        ids = torch.tensor([[self.prompts.eos_id, 0]], device=self.device)
        check_logits(model, ids, name=f"reader {name!r}")
        self._learns_positions = learns_positions(model)
        config = model.config.get_text_config()
        self._max_positions: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self._warned = False

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        device_map: Any = None,
        attn_implementation: str = "sdpa",
        load_in_4bit: bool = False,
        bos: bool | None = None,
    ) -> Reader:
        """Load a reader from a local folder, a hub id, or `testbed:llama` / `testbed:qwen`.

        Args:
            device_map: as in `transformers`; `auto` spreads the model over the GPUs.
            load_in_4bit: NF4 weights through bitsandbytes (needs a GPU).

        Raises:
            ConfigError: there is no such model, or it cannot be a reader.
        """
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
        if device_map is not None:
            options["device_map"] = device_map
        if load_in_4bit:
            options["quantization_config"] = nf4_config(dtype)
        model = load_weights(AutoModelForCausalLM, source, **options)
        if device is not None and device_map is None and not load_in_4bit:
            model.to(device)
        tokenizer = load_tokenizer(source)
        return cls(model, tokenizer, name=name, source=str(source), bos=bos)

    @classmethod
    def from_config(
        cls, name: str, config: ReaderConfig, device: torch.device | str | None = None
    ) -> Reader:
        """Load a reader as a run's configuration says."""
        return cls.load(
            config.source,
            name=name,
            dtype=getattr(torch, config.dtype),
            device=device,
            device_map=config.device_map,
            attn_implementation=config.attn_implementation,
            load_in_4bit=config.load_in_4bit,
            bos=config.bos,
        )

    def sharing_weights(self, name: str, *, bos: bool | None = None) -> Reader:
        """Another reader of the same model, which is in memory once."""
        return Reader(self.model, self.tokenizer, name=name, source=self.source, bos=bos)

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.embedding.weight.device

    @property
    def backbone(self) -> nn.Module:
        """The model without its output embedding."""
        return self.model.base_model

    @property
    def head(self) -> nn.Module:
        """The output embedding, `[V, D]`."""
        return self.model.get_output_embeddings()

    @property
    def head_weight(self) -> Tensor:
        """The weight of the output embedding, `[V, D]`."""
        return cast(Tensor, self.head.weight)

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding, `[V, D]`."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def d_model(self) -> int:
        """Width of the input embeddings."""
        return self.embedding.weight.shape[1]

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings: what adapters calibrate to."""
        return self.embedding.weight.detach().float().pow(2).mean().sqrt().item()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the weights: an adapter works with these and no others."""
        return self.weights_digest()

    @cached_property
    def kv_geometry(self) -> KVGeometry:
        """Shape and RMS of this reader's keys and values, on a prompt without text."""
        prompt = self.prompts.build([Turn("")], context="")
        with torch.no_grad():
            ids = torch.tensor([prompt.ids], device=self.device)
            cache = self.backbone(input_ids=ids, use_cache=True).past_key_values
        sides = [(layer.keys, layer.values) for layer in cache.layers]
        _, heads, _, width = sides[0][0].shape
        rms = [tuple(part.float().pow(2).mean().sqrt().item() for part in side) for side in sides]
        return KVGeometry(len(sides), heads, width, cast(Any, tuple(rms)))

    @cached_property
    def filler(self) -> CacheFiller:
        """Puts deep prefixes into caches; one for all of them, because it hooks into the model."""
        return CacheFiller.for_model(self.model)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward."""
        checkpoint_activations(self.model)

    def weights_digest(self) -> str:
        """sha256 over the current weights (not cached: shows that they did not change)."""
        return parameter_digest(self.model.named_parameters())

    def collate(
        self,
        prompts: Sequence[Prompt],
        *,
        prefixes: Sequence[Tensor] | Tensor | None = None,
        deep: Tensor | None = None,
        side: PaddingSide = "right",
    ) -> PromptBatch:
        """Pad prompts into a batch, with row i's prefix `[M_i, D]` at its `latent_at` and, for the
        cache, a deep prefix.

        Raises:
            DataError: more positions than a model with a table of positions has. Others are warned
                of, once.
        """
        batch = collate(
            prompts,
            embedding=self.embedding,
            pad_id=self.pad_id,
            prefixes=prefixes,
            deep=deep,
            side=side,
        )
        positions = batch.deep_positions + batch.ids_BT.shape[1]
        if positions > self._max_positions:
            self._report_overlong(positions)
        return batch

    def _report_overlong(self, positions: int) -> None:
        message = (
            f"a prompt takes {positions:,} positions, reader {self.name!r} knows "
            f"{self._max_positions:,}"
        )
        if self._learns_positions:
            raise DataError(f"{message}; shorten the texts, or choose another reader")
        if not self._warned:
            self._warned = True
            logger.warning("%s: what it says to such prompts means little", message)

    def target_hidden(self, batch: PromptBatch) -> Tensor:
        """Last hidden states `[N, D]` at the scored positions (gradients flow to the prefixes)."""
        cache = None
        if batch.deep is not None:
            cache = training_cache(batch.deep.shape[0])
            self.filler.fill(cache, prefix_L2BHPD=batch.deep, batch_size=len(batch.ids_BT))
        output = self.backbone(**batch.model_inputs(), past_key_values=cache, use_cache=False)
        hidden_BTD = output.last_hidden_state
        rows = batch.rows_N.to(hidden_BTD.device)
        return hidden_BTD[rows, batch.cols_N.to(hidden_BTD.device)]

    def target_logprobs(self, batch: PromptBatch) -> Tensor:
        """Log-probabilities `[N, V]` at the scored positions, fp32."""
        return self.head(self.target_hidden(batch)).float().log_softmax(-1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        prefixes: Sequence[Tensor] | Tensor | None = None,
        deep: Tensor | None = None,
        options: DecodeOptions | None = None,
        numbers: Sequence[int] | None = None,
        side: PaddingSide = "left",
    ) -> list[list[int]]:
        """Decode with a KV cache; returns the new token ids of each row, without EOS.

        Args:
            numbers: of the examples, so that what is sampled for one does not depend on how a data
                set is cut into batches; 0, 1, ... if not given.
        """
        options, eos = options or DecodeOptions(), self.prompts.eos_id
        numbers = numbers or range(len(prompts))
        batch = self.collate(prompts, prefixes=prefixes, deep=deep, side=side)
        mask = batch.attention_mask()
        lengths = batch.lengths_B
        position = batch.deep_positions + lengths
        inputs = {**batch.model_inputs(), "attention_mask": mask}
        output = self.backbone(**inputs, past_key_values=self._cache(batch), use_cache=True)
        rows = torch.arange(len(prompts), device=self.device)
        width = batch.ids_BT.shape[1]
        last = lengths - 1 if side == "right" else torch.full_like(lengths, width - 1)
        logits_BV = self.head(output.last_hidden_state[rows, last]).float()
        new_ids: list[Tensor] = []
        done = torch.zeros_like(rows, dtype=torch.bool)
        for step in range(options.max_new_tokens):
            token_B = pick_tokens(logits_BV, step, options, numbers=numbers, eos_id=eos)
            done |= token_B == eos
            new_ids.append(torch.where(done, eos, token_B))
            if step + 1 == options.max_new_tokens or bool(done.all()):
                break
            if self._learns_positions and int(position.max()) + step >= self._max_positions:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = self.backbone(
                input_ids=token_B[:, None],
                attention_mask=mask,
                position_ids=(position + step)[:, None],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logits_BV = self.head(output.last_hidden_state[:, -1]).float()
        ids = torch.stack(new_ids, 1).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in ids]

    @torch.no_grad()
    def first_logits(
        self,
        prompts: Sequence[Prompt],
        *,
        prefixes: Sequence[Tensor] | Tensor | None = None,
        deep: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, V]` of the first new token: a prefill, with its KV cache made and dropped."""
        batch = self.collate(prompts, prefixes=prefixes, deep=deep, side="left")
        inputs = batch.model_inputs()
        if len(prompts) == 1:
            inputs["attention_mask"] = None  # nothing is padded
        output = self.backbone(**inputs, past_key_values=self._cache(batch), use_cache=True)
        return self.head(output.last_hidden_state[:, -1])

    def _cache(self, batch: PromptBatch) -> DynamicCache:
        """A cache to decode with, holding the batch's deep prefix."""
        cache = DynamicCache(config=self.model.config)
        if batch.deep is not None:
            self.filler.fill(cache, prefix_L2BHPD=batch.deep, batch_size=len(batch.ids_BT))
        return cache

    def decode(self, ids: Sequence[int]) -> str:
        """Answer text of generated ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def load_readers(
    configs: Mapping[str, ReaderConfig], device: torch.device | str | None = None
) -> dict[str, Reader]:
    """The frozen readers of a run by name. Those of one source and the same options share one
    model."""
    readers: dict[str, Reader] = {}
    loaded: dict[ReaderConfig, Reader] = {}
    for name, config in configs.items():
        options = replace(config, bos=None)  # what a prompt begins with is no matter of the weights
        if options in loaded:
            readers[name] = loaded[options].sharing_weights(name, bos=config.bos)
        else:
            readers[name] = loaded[options] = Reader.from_config(name, config, device)
    return readers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the decoder layers of a model recompute their activations in backward.

    Not with transformers' own switch: that one works in train mode only and takes the cache, and a
    deep prefix with it, from every layer.
    """
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, _Checkpointed):  # a model may be shared, and asked twice
            layer.forward = _Checkpointed(checkpoint, layer.forward, use_reentrant=False)


class _Checkpointed(partial[Any]):
    """The forward pass of a layer that is run again in backward."""
