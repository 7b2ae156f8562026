"""One pass of a reader over a batch: from payload codes and token ids to the next token's logits.

Shapes: B rows, T columns, R payloads (1 or B), M latents, D `d_model`, V vocabulary; L layers, H
key/value heads, P deep positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from latentwire_fast.models.attachments.base import Attachment
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.arriving_layer import settle
from latentwire_fast.readers.attention import causal_mask, mask_free
from latentwire_fast.readers.decoding_cache import decoding_cache
from latentwire_fast.readers.layer_updates import updated_layers
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.batch import Batch
from latentwire_fast.serving.graphs import CapturedPass, GraphMemory
from latentwire_fast.serving.input_buffer import InputBuffer
from latentwire_fast.serving.options import Mark
from latentwire_fast.serving.payload_batch import Parcel
from latentwire_fast.serving.prefixes import Given, TrainedParts, put_soft
from latentwire_fast.serving.prompt_head import Head
from latentwire_fast.serving.static_cache import write_through
from latentwire_fast.wire import Header


class ForwardPass:
    """The forward pass that engines run op by op, compiled, or captured.

    Args:
        parts: what was trained for the reader; None where only text and embeddings are read.
        compiled: whether the reader's backbone is compiled.
        mark: see `ReceiverOptions`.
    """

    def __init__(
        self, reader: Reader, parts: TrainedParts | None, *, compiled: bool, mark: Mark
    ) -> None:
        self.reader, self.parts, self.mark = reader, parts, mark
        # One compilation for all lengths of a batch; one for each takes a minute of a reader.
        self._compiled = torch.compile(reader.backbone, dynamic=True) if compiled else None

    def soft_tokens(self, parcel: Parcel) -> int:
        """The number of columns that a payload takes in a prompt."""
        assert self.parts is not None
        return _positions(self.parts.adapter, parcel.header)

    def deep_positions(self, parcel: Parcel | None, head: Head | None) -> int:
        """P, how many positions payloads, or what is kept of the prompts, take before these."""
        if head is not None:
            return len(head.ids)
        if parcel is None or self.parts is None:
            return 0
        return _positions(self.parts.deep_prefix, parcel.header)

    @property
    def head_positions(self) -> int:
        """How many of a prompt's first ids the deep prefix holds already."""
        deep = None if self.parts is None else self.parts.deep_prefix
        return deep.head_positions if isinstance(deep, Attachment) else 0

    def prefixes(self, batch: Batch) -> Given:
        """What the reader is given of a batch's payloads.

        Raises:
            PayloadError: values that no encoder sends.
        """
        assert self.parts is not None
        assert batch.header is not None
        inputs = self._send(batch)
        return self.parts(inputs, batch.header, mark=self.mark)

    def run(self, batch: Batch) -> tuple[Tensor, DynamicCache, LayerUpdates | None]:
        """Logits `[B, V]` of the next token, the cache behind the prompts, and what changes the
        hidden states of the tokens that follow too.

        Raises:
            PayloadError: values that no encoder sends.
        """
        inputs = self._send(batch)
        self.mark("parse")
        cache = decoding_cache(self.reader.model)
        given = self._given(inputs, batch.header)
        logits_BV = self._read(
            inputs,
            given,
            target=cache,
            cache=lambda: cache,
            head=batch.head,
            embeddings=batch.embeddings,
        )
        return logits_BV, cache, None if given is None else given.layers

    def capture(self, batch: Batch, *, new_tokens: int, memory: GraphMemory) -> CapturedPass:
        """The pass as a graph for batches of this shape, with a cache of its own that has room for
        `new_tokens` behind the prompts."""
        model = self.reader.model
        deep = self.deep_positions(batch.parcel, batch.head)
        rows, width = batch.layout.ids_BT.shape
        static = StaticCache(config=model.config, max_cache_len=deep + width + new_tokens)
        if not deep:  # otherwise the filler sets it up, as one block
            geometry = self.reader.kv_geometry
            static.early_initialization(
                rows, geometry.heads, geometry.head_width, model.dtype, self.reader.device
            )
        with mask_free(model) as needs_no_mask:
            embeddings = self.reader.embedding.weight
            forward = partial(
                self._given_and_read,
                header=batch.header,
                head=batch.head,
                target=static,
                cache=lambda: write_through(static, length=deep),
                attention_mask=None
                if needs_no_mask
                else causal_mask(
                    width, deep + width, dtype=embeddings.dtype, device=embeddings.device
                ),
            )
            return CapturedPass(forward, batch, cache=static, memory=memory)

    def _send(self, batch: Batch) -> Mapping[str, Tensor]:
        """The batch's values on the device, those of payloads checked."""
        batch.verify()
        inputs = InputBuffer(batch.fields, device=self.reader.device)
        inputs.fill(batch.values())
        return inputs.tensors

    def _given(self, inputs: Mapping[str, Tensor], header: Header | None) -> Given | None:
        """What is made of payloads; None where there are none."""
        if header is None:
            return None
        assert self.parts is not None
        return self.parts(inputs, header, mark=self.mark)

    def _given_and_read(
        self, inputs: Mapping[str, Tensor], header: Header | None, **options: Any
    ) -> Tensor:
        """`_read` of payloads."""
        return self._read(inputs, self._given(inputs, header), **options)

    def _read(
        self,
        inputs: Mapping[str, Tensor],
        given: Given | None,
        *,
        target: Cache,
        cache: Callable[[], Cache],
        head: Head | None = None,
        attention_mask: Tensor | None = None,
        embeddings: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Logits `[B, V]` of the next token.

        Args:
            target: takes the deep prefix or the head; cache: makes what the reader then works with.
            attention_mask: only where transformers cannot make its own.
        """
        ids_BT = inputs["ids"]
        embeds_BTD = self.reader.embedding(ids_BT)
        first = 0
        if embeddings is not None:
            soft_ND = torch.cat([*embeddings]).to(embeds_BTD.device)
            embeds_BTD = put_soft(embeds_BTD, soft_ND, inputs["source"])
        if given is not None:
            if given.soft is not None:
                embeds_BTD = put_soft(embeds_BTD, given.soft.flatten(0, 1), inputs["source"])
            # Where a head is kept, no deep prefix is trained.
            deep_L2RHPd = given.deep if head is None else head.deep_L21HPD
            if deep_L2RHPd is not None:
                first = deep_L2RHPd.shape[4]
                self.reader.filler.fill(
                    target, prefix_L2BHPD=deep_L2RHPd, batch_size=len(ids_BT), stable=True
                )
            self.mark("placement")
        positions_1T = torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device)[None]
        with updated_layers(self.reader.model, None if given is None else given.layers):
            hidden_BTD = self._backbone(
                compiled=embeddings is None,
                inputs_embeds=embeds_BTD,
                attention_mask=attention_mask,
                position_ids=positions_1T,
                past_key_values=cache(),
                use_cache=True,
            )
        last_B = inputs["last"].to(hidden_BTD.device)
        rows = torch.arange(len(last_B), device=hidden_BTD.device)
        logits_BV = self.reader.logits(hidden_BTD[rows, last_B])
        self.mark("reader")
        return logits_BV

    def _backbone(self, *, compiled: bool, **arguments: Any) -> Tensor:
        """Last hidden states `[B, T, D]`.

        Args:
            compiled: whether a compiled backbone may run.
        """
        if self._compiled is None or not compiled:
            return self.reader.backbone(**arguments).last_hidden_state
        settle(arguments["past_key_values"])
        # By default, what would be compiled once too often runs uncompiled, and nobody knows.
        strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
        with strict, mask_free(self.reader.model):
            return self._compiled(**arguments).last_hidden_state


def _positions(part: nn.Module | None, header: Header) -> int:
    """How many positions a trained part makes of a payload; one per latent unless it says."""
    if part is None:
        return 0
    return part.positions if isinstance(part, Attachment) else header.latents
