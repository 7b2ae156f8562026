"""One pass of a reader over a batch: from payload codes and token ids to the next token's logits.

Shapes: B rows, T columns, R payloads, M latents, D `d_model`, V vocabulary; L layers, H
key/value heads, P deep positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from latentwire_fast.models.attachments.base import Attachment, ReaderInputs
from latentwire_fast.models.joined import join_deep, joined_inputs, refuse_layers
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.arriving_layer import settle
from latentwire_fast.readers.attention import causal_mask, mask_free
from latentwire_fast.readers.decoding_cache import decoding_cache
from latentwire_fast.readers.layer_updates import updated_layers
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.batch import Batch, Spans, deep_positions
from latentwire_fast.serving.graphs import CapturedPass, GraphMemory
from latentwire_fast.serving.input_buffer import InputBuffer
from latentwire_fast.serving.options import Mark
from latentwire_fast.serving.payload_batch import Parcel
from latentwire_fast.serving.prefixes import Given, TrainedParts, put_soft
from latentwire_fast.serving.static_cache import write_through


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

    def spans(self, parcel: Parcel) -> Spans:
        """The positions that a payload takes, padding included.

        Raises:
            ConfigError: several payloads in a prompt, and layers that read them.
        """
        assert self.parts is not None
        if self.parts.layers is not None:
            refuse_layers(parcel.pieces, self.reader)
        return Spans(
            _positions(self.parts.adapter, parcel.latents),
            _positions(self.parts.deep_prefix, parcel.latents),
            self.head_positions,
        )

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
        given = self._given(self._send(batch), batch)
        assert given is not None
        return given

    def reader_inputs(self, batch: Batch) -> dict[str, Any]:
        """What stands in the place of the texts of a batch with payloads: arguments of
        `Reader.score`.

        Raises:
            PayloadError: values that no encoder sends.
        """
        assert batch.parcel is not None
        given = self.prefixes(batch)
        soft_RMD = given.soft
        if soft_RMD is None:
            rows = len(batch.parcel.payloads)
            soft_RMD = self.reader.embedding.weight.new_zeros(rows, 0, self.reader.d_model)
        inputs: ReaderInputs = {
            "prefixes": soft_RMD,
            "deep": given.deep,
            "head": self.head_positions,
            "layers": given.layers,
        }
        joined = joined_inputs(inputs, batch.parcel.pieces, reader=self.reader)
        if batch.parcel.messages == 1:  # all rows read it
            joined["prefixes"] = [joined["prefixes"][0]] * len(batch.layout.ids_BT)
        return joined

    def run(self, batch: Batch) -> tuple[Tensor, DynamicCache, LayerUpdates | None]:
        """Logits `[B, V]` of the next token, the cache behind the prompts, and what changes the
        hidden states of the tokens that follow too.

        Raises:
            PayloadError: values that no encoder sends.
        """
        inputs = self._send(batch)
        self.mark("parse")
        cache = decoding_cache(self.reader.model)
        given = self._given(inputs, batch)
        logits_BV = self._read(
            inputs,
            given,
            batch=batch,
            target=cache,
            cache=lambda: cache,
            attention_mask=_mask_of_uneven(batch, self.reader.device),
        )
        return logits_BV, cache, None if given is None else given.layers

    def capture(self, batch: Batch, *, new_tokens: int, memory: GraphMemory) -> CapturedPass:
        """The pass as a graph for batches of this shape, with a cache of its own that has room for
        `new_tokens` behind the prompts."""
        model = self.reader.model
        deep = deep_positions(batch.parcel, batch.head, batch.spans)
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
                batch=batch,
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

    def _given(self, inputs: Mapping[str, Tensor], batch: Batch) -> Given | None:
        """What is made of payloads; None where there are none."""
        if batch.parcel is None:
            return None
        assert self.parts is not None
        return self.parts(inputs, batch.parcel, mark=self.mark)

    def _given_and_read(
        self, inputs: Mapping[str, Tensor], *, batch: Batch, **options: Any
    ) -> Tensor:
        """`_read` of payloads."""
        return self._read(inputs, self._given(inputs, batch), batch=batch, **options)

    def _read(
        self,
        inputs: Mapping[str, Tensor],
        given: Given | None,
        *,
        batch: Batch,
        target: Cache,
        cache: Callable[[], Cache],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, V]` of the next token.

        Args:
            inputs: of this batch, or of another one of its shape where this is captured.
            target: takes the deep prefix or the head; cache: makes what the reader then works with.
            attention_mask: only where transformers cannot make its own.
        """
        ids_BT = inputs["ids"]
        embeds_BTD = self.reader.embedding(ids_BT)
        first: int | Tensor = 0
        if batch.embeddings is not None:
            soft_ND = torch.cat([*batch.embeddings]).to(embeds_BTD.device)
            embeds_BTD = put_soft(embeds_BTD, soft_ND, inputs["source"])
        if given is not None:
            if given.soft is not None:
                embeds_BTD = put_soft(embeds_BTD, given.soft.flatten(0, 1), inputs["source"])
            # Where a head is kept, no deep prefix is trained.
            deep_L2RHPd = given.deep if batch.head is None else batch.head.deep_L21HPD
            if deep_L2RHPd is not None:
                deep_L2RHPd = self._joined(deep_L2RHPd, batch, inputs)
                first = deep_L2RHPd.shape[4]
                self.reader.filler.fill(
                    target, prefix_L2BHPD=deep_L2RHPd, batch_size=len(ids_BT), stable=True
                )
            self.mark("placement")
        if batch.deep_lengths_B is not None:
            first = torch.from_numpy(batch.deep_lengths_B).to(ids_BT.device)[:, None]
        positions_BT = first + torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        with updated_layers(self.reader.model, None if given is None else given.layers):
            hidden_BTD = self._backbone(
                compiled=batch.embeddings is None and batch.deep_lengths_B is None,
                inputs_embeds=embeds_BTD,
                attention_mask=attention_mask,
                position_ids=positions_BT,
                past_key_values=cache(),
                use_cache=True,
            )
        last_B = inputs["last"].to(hidden_BTD.device)
        rows = torch.arange(len(last_B), device=hidden_BTD.device)
        logits_BV = self.reader.logits(hidden_BTD[rows, last_B])
        self.mark("reader")
        return logits_BV

    def _joined(self, deep_L2RHPd: Tensor, batch: Batch, inputs: Mapping[str, Tensor]) -> Tensor:
        """The deep prefixes of prompts from those of their payloads."""
        if batch.parcel is None or batch.deep_joins is None:
            return deep_L2RHPd
        return join_deep(
            deep_L2RHPd,
            inputs["deep_source"],
            inputs["deep_by"],
            reader=self.reader,
            turns=max(batch.parcel.pieces.per_prompt) > 1,
        )

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


def _mask_of_uneven(batch: Batch, device: torch.device) -> Tensor | None:
    """1 where a position may be read, int64 `[B, P + T]`, of rows whose deep prefixes differ in
    length; None for others, which need no mask."""
    if batch.deep_lengths_B is None:
        return None
    column_P = np.arange(batch.deep_lengths_B.max(), 0, -1)
    column_T = np.arange(batch.layout.width)
    deep_BP = column_P <= batch.deep_lengths_B[:, None]
    own_BT = column_T < batch.layout.lengths_B[:, None]
    return torch.from_numpy(np.concatenate([deep_BP, own_BT], 1)).long().to(device)


def _positions(part: nn.Module | None, latents: int) -> int:
    """How many positions a trained part makes of a payload; one per latent unless it says."""
    if part is None:
        return 0
    return part.positions_of(latents) if isinstance(part, Attachment) else latents
