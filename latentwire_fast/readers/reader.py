"""One frozen LLM that answers from text or from a latent prefix.

Shapes: B rows, T positions, D `d_model`, V vocabulary, N scored answer tokens, M prefix positions;
a deep prefix is `[L, 2, B or 1, H, P, d_head]`.

    reader = Reader.load("path/or/hub-id", name="llama")
    prompt = reader.prompts.build([Turn("Who?")], context="...", latent="context")
    reader.score([prompt], prefixes=[prefix_MD])

Answers are decoded by `latentwire_fast.serving.Receiver`, which takes payloads too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.config.schema import LoraSettings, PromptConfig, ReaderConfig
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.ops.bf16 import is_fast_at_bf16
from latentwire_fast.prompts.batch import LayerUpdates, PaddingSide, PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt, PromptBuilder, Turn
from latentwire_fast.readers.arriving_layer import training_cache
from latentwire_fast.readers.decoding_cache import decoding_cache
from latentwire_fast.readers.device_maps import placement, warn_of_idle_cards
from latentwire_fast.readers.frozen_lm import FrozenLM
from latentwire_fast.readers.kv_cache import CacheFiller, decoder_layers
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.layer_updates import updated_layers
from latentwire_fast.readers.loading import (
    check_attention,
    load_tokenizer,
    load_weights,
    nf4_config,
)
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.readers.weights import keep_ends_in_memory, use_plain_nf4

logger = logging.getLogger(__name__)


class Reader(FrozenLM):
    """A frozen causal LM that is asked through prompts, with a prefix among them or without.

    Args:
        model: as in `FrozenLM`.
        tokenizer: its tokenizer.
        name: the key of this reader in adapters, metrics and reports.
        prompt: how it is asked; passed to `PromptBuilder`.

    Attributes:
        lora_settings: of low-rank updates that a run is to train; None for none.
        lora: the low-rank updates that it reads with, if it has any (`ReaderLora.attach`).
        lock: held by receivers while they read with it, and inside `base`: both change how the
            model computes, for every thread.

    Raises:
        ConfigError: as `FrozenLM` and `PromptBuilder`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        name: str,
        source: str = "",
        prompt: PromptConfig | None = None,
    ) -> None:
        super().__init__(model, PromptBuilder(tokenizer, prompt), name=name)
        self.source = source
        self.lora_settings: LoraSettings | None = None
        self.lora: ReaderLora | None = None
        self.lock = threading.RLock()
        self._warned: set[str] = set()

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
        max_memory: str | None = None,
        prompt: PromptConfig | None = None,
    ) -> Reader:
        """Load a reader from a local folder, a .gguf file, `package:NAME`, a hub id, or
        `testbed:llama` / `testbed:qwen`.

        Args:
            device_map: as in `transformers`; `auto` spreads the model over the GPUs.
            load_in_4bit: NF4 weights through bitsandbytes, on a GPU or the CPU.
            max_memory: with a device map, as in `ReaderConfig`.

        Raises:
            ConfigError: there is no such model, or it cannot be a reader.
        """
        check_attention(attn_implementation)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
        if load_in_4bit:
            options["quantization_config"] = nf4_config(dtype)
            if device is not None and device_map is None:  # quantised where they are to be
                device_map = {"": torch.device(device)}
        options |= placement(device_map, max_memory)
        model = load_weights(AutoModelForCausalLM, source, **options)
        if device is not None and device_map is None:
            model.to(device)
        use_plain_nf4(model)
        keep_ends_in_memory(model)
        tokenizer = load_tokenizer(source)
        reader = cls(model, tokenizer, name=name, source=str(source), prompt=prompt)
        assert reader.abilities  # now, rather than when it is first used
        return reader

    @classmethod
    def from_config(
        cls,
        name: str,
        config: ReaderConfig,
        device: torch.device | str | None = None,
        *,
        dtype: str | None = None,
    ) -> Reader:
        """Load a reader as a run's configuration says.

        Args:
            dtype: to compute in, where that is not the configuration's.

        Raises:
            ConfigError: as `load` and `compute_in`, or a dtype that no reader has.
        """
        if dtype is not None:
            changes: dict[str, Any] = {"compute_dtype": dtype}
            config = replace(config, **changes)  # raises where it is none
        reader = cls.load(
            config.source,
            name=name,
            dtype=getattr(torch, config.dtype),
            device=device,
            device_map=config.device_map,
            attn_implementation=config.attn_implementation,
            load_in_4bit=config.load_in_4bit,
            max_memory=config.max_memory,
            prompt=config,
        )
        wanted = config.compute_dtype
        if wanted == "auto":
            wanted = "bfloat16" if is_fast_at_bf16(reader.device.type) else None
        if wanted not in (None, config.dtype):
            reader.compute_in(getattr(torch, cast(str, wanted)))
        reader.lora_settings = config.lora
        return reader

    def sharing_weights(self, name: str, *, prompt: PromptConfig | None = None) -> Reader:
        """Another reader of the same model, which is in memory once."""
        reader = Reader(self.model, self.tokenizer, name=name, source=self.source, prompt=prompt)
        reader.fingerprint = self.fingerprint  # of the weights before `compute_in`
        reader.abilities = self.abilities
        return reader

    @cached_property
    def kv_geometry(self) -> KVGeometry:
        """Shape and RMS of this reader's keys and values, on a prompt without text.

        Raises:
            ConfigError: it takes no deep prefix.
        """
        self.require("deep")
        prompt = self.prompts.build([Turn("")], context="")
        cache = decoding_cache(self.model)
        with torch.no_grad():
            ids = torch.tensor([prompt.ids], device=self.device)
            self.backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        return KVGeometry.of_cache(cache, layers=len(decoder_layers(self.model)))

    @cached_property
    def filler(self) -> CacheFiller:
        """Puts deep prefixes into caches."""
        return CacheFiller.for_model(self.model, geometry=self.kv_geometry)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside the block the reader reads as it was loaded, without low-rank updates.

        Raises:
            ConfigError: they were merged into its weights.
        """
        with self.lock, nullcontext() if self.lora is None else self.lora.disabled():
            yield

    def collate(
        self,
        prompts: Sequence[Prompt],
        *,
        prefixes: Sequence[Tensor] | Tensor | None = None,
        deep: Tensor | None = None,
        deep_lengths: Sequence[int] | None = None,
        head: int = 0,
        layers: LayerUpdates | None = None,
        side: PaddingSide = "right",
    ) -> PromptBatch:
        """Pad prompts into a batch, with row i's prefix `[M_i, D]` at its `latent_at` and, for the
        cache, a deep prefix.

        Args:
            deep_lengths: how many positions of the deep prefix are real in each row, the last ones;
                None: all.
            head: how many of each prompt's first ids the deep prefix holds already.
            layers: what changes the hidden states between the layers.

        Raises:
            ConfigError: prompts and prefixes do not match, or padding where the reader takes none.
            DataError: as `check_positions`.
        """
        if side == "left" and self.abilities.left:
            raise ConfigError(
                f"reader {self.name!r} ({self.family}) takes no padding on the left: "
                f"{self.abilities.left}; pad on the right"
            )
        batch = collate(
            [prompt.behind(head) for prompt in prompts],
            embedding=self.embedding,
            pad_id=self.pad_id,
            prefixes=prefixes,
            deep=deep,
            layers=layers,
            deep_lengths=deep_lengths,
            side=side,
        )
        if batch.deep_lengths_B is not None and self.abilities.left:
            raise ConfigError(
                f"reader {self.name!r} ({self.family}) takes no deep prefixes of several lengths "
                f"in a batch: {self.abilities.left}; give it prompts with as many payloads each"
            )
        self.check_positions(batch.deep_positions + batch.ids_BT.shape[1])
        return batch

    def check_positions(self, positions: int) -> None:
        """Raise unless a prompt of so many positions, a deep prefix included, can be read.

        Raises:
            DataError: the model has a table of positions, and it is shorter. Other models compute
                positions; that they were not made for so many is logged once.
        """
        if positions <= self.max_positions:
            return
        message = (
            f"a prompt takes {positions:,} positions, reader {self.name!r} knows "
            f"{self.max_positions:,}"
        )
        if self.learns_positions:
            raise DataError(f"{message}; shorten the texts, or choose another reader")
        self.warn_once("positions", f"{message}: what it says to such prompts means little")

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning, the first time that there is one on this topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s", message)

    def target_hidden(self, batch: PromptBatch) -> Tensor:
        """Last hidden states `[N, D]` at the scored positions (gradients flow to the prefixes)."""
        hidden_BTD: Tensor = self._read(batch).last_hidden_state
        return _scored(hidden_BTD, batch)

    def target_layers(self, batch: PromptBatch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same, and hidden states `[K, N, D]` at these positions in K layers: 0 is what the
        first layer reads, -1 the last hidden states."""
        output = self._read(batch, output_hidden_states=True)
        states = [output.hidden_states[number] for number in layers]
        found = [_scored(states_BTD, batch) for states_BTD in states]
        last_ND = _scored(output.last_hidden_state, batch)
        return last_ND, torch.stack([states_ND.to(last_ND.device) for states_ND in found])

    def _read(self, batch: PromptBatch, **options: Any) -> Any:
        """The backbone's output for a batch, behind its deep prefix."""
        cache = None
        if batch.deep is not None:
            cache = training_cache(batch.deep.shape[0])
            self.filler.fill(cache, prefix_L2BHPD=batch.deep, batch_size=len(batch.ids_BT))
        inputs = batch.model_inputs()
        with updated_layers(self.model, batch.layers):
            return self.backbone(**inputs, past_key_values=cache, use_cache=False, **options)

    def target_logprobs(self, batch: PromptBatch) -> Tensor:
        """Log-probabilities `[N, vocabulary]` at the scored positions, fp32."""
        return self.output_head.logits(self.target_hidden(batch)).log_softmax(-1)

    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        prefixes: Sequence[Tensor] | Tensor | None = None,
        deep: Tensor | None = None,
        deep_lengths: Sequence[int] | None = None,
        head: int = 0,
        layers: LayerUpdates | None = None,
        side: PaddingSide = "right",
    ) -> TargetScores:
        """Log-probabilities of the prompts' answer tokens, in one teacher-forced pass; gradients
        flow to the prefixes.

        Args:
            prefixes, deep, deep_lengths, head, layers, side: as in `collate`.

        Raises:
            ConfigError, DataError: as `collate`.
        """
        batch = self.collate(
            prompts,
            prefixes=prefixes,
            deep=deep,
            deep_lengths=deep_lengths,
            head=head,
            layers=layers,
            side=side,
        )
        return TargetScores(
            hidden_ND=self.target_hidden(batch),
            head=self.output_head,
            labels_N=batch.labels_N,
            rows_N=batch.rows_N,
            step_N=batch.step_N,
            prompts=len(prompts),
            stop_ids=tuple(self.stop_ids),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Answer text of generated ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _scored(hidden_BTD: Tensor, batch: PromptBatch) -> Tensor:
    """Hidden states `[N, D]` at the scored positions of a batch."""
    rows_N = batch.rows_N.to(hidden_BTD.device)
    return hidden_BTD[rows_N, batch.cols_N.to(hidden_BTD.device)]


def load_readers(
    configs: Mapping[str, ReaderConfig],
    device: torch.device | str | None = None,
    *,
    dtype: str | None = None,
) -> dict[str, Reader]:
    """The frozen readers of a run by name. Those of one source and the same options share one
    model, but for those that get low-rank updates.

    Args:
        device, dtype: as in `Reader.from_config`.
    """
    readers: dict[str, Reader] = {}
    loaded: dict[ReaderConfig, Reader] = {}
    for name, config in configs.items():
        options = config.weights
        if options in loaded and config.lora is None:
            readers[name] = loaded[options].sharing_weights(name, prompt=config)
        else:
            reader = Reader.from_config(name, config, device, dtype=dtype)
            readers[name] = loaded[options] = reader
    devices = (weight.device for reader in loaded.values() for weight in reader.model.parameters())
    warn_of_idle_cards(devices, cards=torch.cuda.device_count())
    return readers
