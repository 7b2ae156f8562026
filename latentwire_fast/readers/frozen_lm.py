"""A frozen causal LM and its tokenizer: what its weights and its configuration say of it. How it is
asked is the matter of `Reader`.

Shapes: D `d_model`, V rows of the output embedding.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import PromptBuilder
from latentwire_fast.readers.abilities import ReaderAbilities
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
from latentwire_fast.readers.embeddings import embedding_size, input_embedding
from latentwire_fast.readers.layer_updates import why_no_updates
from latentwire_fast.readers.logits import LogitTransform
from latentwire_fast.readers.output_head import OutputHead, without_gaps
from latentwire_fast.readers.probe import Subject
from latentwire_fast.readers.probe_cache import probed_abilities
from latentwire_fast.readers.rotary import Turner
from latentwire_fast.readers.weights import cast_weights, is_offloaded, weights_digest


class FrozenLM:
    """A causal LM whose weights stay as they are, with its tokenizer.

    Args:
        model: any Hugging Face causal LM whose logits are its output embedding applied to the last
            hidden state, perhaps scaled or capped (checked). It is put into eval mode and frozen.
        prompts: the builder of its prompts, with its tokenizer.
        name: what messages call it.

    Attributes:
        tokenizer: its tokenizer.
        pad_id: stands at padding.
        logit_transform: what it does to its logits behind the output embedding.
        learns_positions: whether it has a table of positions, beyond which it cannot read.

    Raises:
        ConfigError: the model makes its logits in another way, or the tokenizer has tokens that the
            model does not know.
    """

    def __init__(self, model: PreTrainedModel, prompts: PromptBuilder, *, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.prompts = prompts
        self.tokenizer = tokenizer = prompts.tokenizer
        self.name = name
        check_prompt_ids(prompts, model, name=f"reader {name!r}")
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id >= len(self.embedding.weight):
            self.pad_id = prompts.eos_id
        check_vocabulary(tokenizer, model, name=f"reader {name!r}")
        self.logit_transform = self._check_logits()
        self.learns_positions = learns_positions(model)

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
        cast_weights(self.model, dtype)
        self.logit_transform = self._check_logits()
        self.__dict__.pop("abilities", None)

    def _check_logits(self) -> LogitTransform:
        ids = torch.tensor([[self.prompts.eos_id, 0]], device=self.device)
        return check_logits(self.model, ids, name=f"reader {self.name!r}")

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
            gaps=self._gaps,
            scale=self.logit_transform.scale,
            softcap=self.logit_transform.softcap or None,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits `[..., V]` of last hidden states `[..., D]`, in the head's dtype."""
        return self.logit_transform(self.head(hidden))

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
    def _gaps(self) -> Tensor | None:
        """Ids below `vocabulary` that stand for nothing either; None where there are none."""
        known = self.tokenizer.get_vocab().values()
        gaps = sorted({*range(self.vocabulary)} - {*known})
        return torch.tensor(gaps, dtype=torch.long) if gaps else None

    def of_tokens(self, logits: Tensor) -> Tensor:
        """The logits `[..., vocabulary]` of an output embedding's `[..., V]` that belong to tokens.

        Rows that fill up a block of memory are cut off, gaps are minus infinity: decoding and
        scoring never choose what stands for nothing.
        """
        return without_gaps(logits[..., : self.vocabulary], self._gaps)

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

    @cached_property
    def layer_fault(self) -> str:
        """Why hidden states between its layers cannot be updated; empty where they can."""
        ids_12 = torch.tensor([[self.prompts.eos_id, 0]], device=self.device)
        return why_no_updates(self.model, ids_12, width=self.d_model)

    def require(self, place: Literal["prefixes", "deep", "layers"]) -> None:
        """Raise unless this reader takes soft tokens, a deep prefix, or updates between its layers.

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
        if place == "layers" and self.layer_fault:
            raise ConfigError(
                f"reader {self.name!r} ({self.family}) takes nothing between its layers: "
                f"{self.layer_fault}; give it soft tokens or a deep prefix, or choose another "
                "reader"
            )

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
