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
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from latentwire_fast.config.schema import LoraSettings, PromptConfig, ReaderConfig
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.prompts.batch import PaddingSide, PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt, PromptBuilder, Turn
from latentwire_fast.readers.abilities import ReaderAbilities
from latentwire_fast.readers.arriving_layer import training_cache
from latentwire_fast.readers.checkpointing import checkpoint_activations
from latentwire_fast.readers.checks import (
    backbone_of,
    check_logits,
    check_prompt_ids,
    check_vocabulary,
    learns_positions,
    position_limit,
)
from latentwire_fast.readers.decoding import token_ids
from latentwire_fast.readers.decoding_cache import decoding_cache
from latentwire_fast.readers.device_maps import placement, warn_of_idle_cards
from latentwire_fast.readers.embeddings import embedding_size, input_embedding
from latentwire_fast.readers.kv_cache import CacheFiller, decoder_layers
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.loading import (
    check_attention,
    load_tokenizer,
    load_weights,
    nf4_config,
)
from latentwire_fast.readers.logits import LogitTransform
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.output_head import OutputHead
from latentwire_fast.readers.probe import Subject
from latentwire_fast.readers.probe_cache import probed_abilities
from latentwire_fast.readers.rotary import Turner
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.readers.weights import (
    is_offloaded,
    keep_ends_in_memory,
    use_plain_nf4,
    weights_digest,
)

logger = logging.getLogger(__name__)


class Reader:
    """A frozen causal LM, its tokenizer and its prompt builder.

    Args:
        model: any Hugging Face causal LM whose logits are its output embedding applied to the last
            hidden state, perhaps scaled or capped (checked). It is put into eval mode and frozen.
        tokenizer: its tokenizer.
        name: the key of this reader in adapters, metrics and reports.
        prompt: how it is asked; passed to `PromptBuilder`.

    Attributes:
        lora_settings: of low-rank updates that a run is to train; None for none.
        lora: the low-rank updates that it reads with, if it has any (`ReaderLora.attach`).
        lock: held by receivers while they read with it, and inside `base`: both change how the
            model computes, for every thread.

    Raises:
        ConfigError: the model makes its logits in another way, or the tokenizer lacks an EOS or
            has tokens that the model does not know.
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
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.prompts = PromptBuilder(tokenizer, prompt)
        check_prompt_ids(self.prompts, model, name=f"reader {name!r}")
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id >= len(self.embedding.weight):
            self.pad_id = self.prompts.eos_id
        check_vocabulary(tokenizer, model, name=f"reader {name!r}")
        self._transform = self._check_logits()
        self.learns_positions = learns_positions(model)
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
        if config.compute_dtype not in (None, config.dtype):
            reader.compute_in(getattr(torch, cast(str, config.compute_dtype)))
        reader.lora_settings = config.lora
        return reader

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute in another dtype from now on. The fingerprint stays that of the weights as they
        were: a model that was trained for them knows this reader.

        Call it before anything is read.

        Raises:
            ConfigError: quantised weights, which have a dtype of their own; or the logits overflow.
        """
        if getattr(self.model, "is_quantized", False):
            raise ConfigError(
                f"reader {self.name!r} has quantised weights, whose dtype is given when they are "
                "loaded; leave --dtype away"
            )
        if is_offloaded(self.model):
            raise ConfigError(
                f"reader {self.name!r} has weights that its device map keeps on a disk or in the "
                "CPU's memory, which stay in their dtype; leave --dtype away"
            )
        assert self.fingerprint  # computed now, and kept
        self.model.to(dtype)
        self._transform = self._check_logits()
        self.__dict__.pop("abilities", None)

    def _check_logits(self) -> LogitTransform:
        ids = torch.tensor([[self.prompts.eos_id, 0]], device=self.device)
        return check_logits(self.model, ids, name=f"reader {self.name!r}")

    def sharing_weights(self, name: str, *, prompt: PromptConfig | None = None) -> Reader:
        """Another reader of the same model, which is in memory once."""
        reader = Reader(self.model, self.tokenizer, name=name, source=self.source, prompt=prompt)
        reader.fingerprint = self.fingerprint  # of the weights before `compute_in`
        reader.abilities = self.abilities
        return reader

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.embedding.weight.device

    @property
    def backbone(self) -> nn.Module:
        """The model without its output embedding."""
        return backbone_of(self.model)

    @property
    def head(self) -> nn.Module:
        """The output embedding, `[V, D]`."""
        return self.model.get_output_embeddings()

    @property
    def head_weight(self) -> Tensor:
        """The weight of the output embedding, `[V, D]`."""
        return cast(Tensor, self.head.weight)

    @property
    def output_head(self) -> OutputHead:
        """The output embedding with what is done to its logits, for losses and scores."""
        return OutputHead.of_module(
            self.head,
            self.vocabulary,
            gaps=self._gaps if len(self._gaps) else None,
            scale=self.logit_scale,
            softcap=self.logit_softcap or None,
        )

    @property
    def logit_scale(self) -> float:
        """Factor on what the output embedding gives; 1 where the model has none."""
        return self._transform.scale

    @property
    def logit_softcap(self) -> float:
        """Cap on the logits, behind that factor (`cap * tanh(logits / cap)`); 0 for none."""
        return self._transform.softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits `[..., V]` of last hidden states `[..., D]`, in the head's dtype."""
        return self._transform(self.head(hidden))

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding, `[V, D]`."""
        return input_embedding(self.model)

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends an answer, first the one that answers are trained to end with: that
        of the chat template, the tokenizer's EOS, and what the model's own `generation_config`
        declares beside it (chat models often end a turn with another token).
        """
        declared = getattr(self.model.generation_config, "eos_token_id", None)
        found = [self.prompts.eos_id, *token_ids([self.tokenizer.eos_token_id, declared])]
        return [i for i in dict.fromkeys(found) if i < self.vocabulary]

    @cached_property
    def vocabulary(self) -> int:
        """How many token ids there are. The output embedding may have more rows, which stand for
        nothing."""
        rows = int(self.head_weight.shape[0])
        return min(rows, 1 + max(self.tokenizer.get_vocab().values()))

    @cached_property
    def _gaps(self) -> Tensor:
        """Ids below `vocabulary` that stand for nothing either."""
        known = self.tokenizer.get_vocab().values()
        return torch.tensor(sorted({*range(self.vocabulary)} - {*known}), dtype=torch.long)

    def of_tokens(self, logits: Tensor) -> Tensor:
        """The logits `[..., vocabulary]` of an output embedding's `[..., V]` that belong to tokens.

        Rows that fill up a block of memory are cut off, gaps are minus infinity: decoding and
        scoring never choose what stands for nothing.
        """
        logits = logits[..., : self.vocabulary]
        if len(self._gaps):
            logits = logits.index_fill(-1, self._gaps.to(logits.device), -torch.inf)
        return logits

    @property
    def max_positions(self) -> int:
        """How many positions the model was made for."""
        config = self.model.config.get_text_config(decoder=True)
        return position_limit(config) or sys.maxsize

    @property
    def d_model(self) -> int:
        """Width of the input embeddings."""
        return self.embedding.weight.shape[1]

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings as the model reads them, over all tokens: what
        adapters calibrate to."""
        return embedding_size(self.embedding).rms

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over its own weights: an adapter works with these and no others."""
        return self.weights_digest()

    @cached_property
    def abilities(self) -> ReaderAbilities:
        """What this reader may be used for, tried on a few tokens (`probe.py`).

        Raises:
            ConfigError: it cannot be used at all.
        """
        special = {*self.tokenizer.all_special_ids}
        subject = Subject(
            self.model,
            tokens=[i for i in range(self.vocabulary) if i not in special],
            pad_id=self.pad_id,
            positions=self.max_positions,
        )
        found = probed_abilities(subject, digest=self.fingerprint)
        if found.reads:
            raise ConfigError(
                f"reader {self.name!r} ({self.family}) cannot be used: {found.reads}; choose "
                "another reader"
            )
        return found

    @property
    def family(self) -> str:
        """What transformers calls this kind of model."""
        return str(self.model.config.model_type)

    def require(self, place: Literal["prefixes", "deep"]) -> None:
        """Raise unless this reader takes soft tokens, or a deep prefix.

        Raises:
            ConfigError: it does not, and why.
        """
        soft, deep = self.abilities.soft, self.abilities.deep
        if place == "prefixes" and soft:
            raise ConfigError(
                f"reader {self.name!r} ({self.family}) takes no soft tokens: {soft}; give it a "
                "deep prefix alone (attachment 'deep'), or choose another reader"
            )
        if place == "deep" and deep:
            raise ConfigError(
                f"reader {self.name!r} ({self.family}) takes no deep prefix: {deep}; give it soft "
                "tokens alone (attachment 'soft'), or choose another reader"
            )

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

    @cached_property
    def turner(self) -> Turner:
        """Turns this reader's keys and queries to other positions.

        Raises:
            ConfigError: as `Turner`.
        """
        return Turner(self.model, name=self.name)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward."""
        checkpoint_activations(self.model)

    def weights_digest(self) -> str:
        """sha256 over its own weights as they are now (not cached: shows that they did not
        change)."""
        return weights_digest(self.model)

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
        head: int = 0,
        side: PaddingSide = "right",
    ) -> PromptBatch:
        """Pad prompts into a batch, with row i's prefix `[M_i, D]` at its `latent_at` and, for the
        cache, a deep prefix.

        Args:
            head: how many of each prompt's first ids the deep prefix holds already.

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
            side=side,
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
        cache = None
        if batch.deep is not None:
            cache = training_cache(batch.deep.shape[0])
            self.filler.fill(cache, prefix_L2BHPD=batch.deep, batch_size=len(batch.ids_BT))
        output = self.backbone(**batch.model_inputs(), past_key_values=cache, use_cache=False)
        hidden_BTD = output.last_hidden_state
        rows = batch.rows_N.to(hidden_BTD.device)
        return hidden_BTD[rows, batch.cols_N.to(hidden_BTD.device)]

    def target_logprobs(self, batch: PromptBatch) -> Tensor:
        """Log-probabilities `[N, vocabulary]` at the scored positions, fp32."""
        return self.output_head.logits(self.target_hidden(batch)).log_softmax(-1)

    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        prefixes: Sequence[Tensor] | Tensor | None = None,
        deep: Tensor | None = None,
        head: int = 0,
        side: PaddingSide = "right",
    ) -> TargetScores:
        """Log-probabilities of the prompts' answer tokens, in one teacher-forced pass; gradients
        flow to the prefixes.

        Args:
            prefixes, deep, head, side: as in `collate`.

        Raises:
            ConfigError, DataError: as `collate`.
        """
        batch = self.collate(prompts, prefixes=prefixes, deep=deep, head=head, side=side)
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
