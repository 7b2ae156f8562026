"""A payload's codes to what its reader takes in: soft tokens, keys and values, updates of layers.

Shapes: B rows, T columns, R payloads, M latents, d latent width, D `d_model`; L layers, H
key/value heads, P deep positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.attachments.base import Attachment
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.payload_batch import Parcel
from latentwire_fast.wire.payload import dequantize


class Given(NamedTuple):
    """What a reader is given of payloads, each where it is trained.

    Attributes:
        soft: soft tokens `[R, M, D]`.
        deep: deep prefix `[L, 2, R, H, P, d_head]`.
        layers: updates of the hidden states between its layers.
    """

    soft: Tensor | None = None
    deep: Tensor | None = None
    layers: LayerUpdates | None = None


class TrainedParts:
    """The trained parts of one reader, in that reader's dtype.

    Args:
        adapter, deep_prefix, layers: see `Receiver`. Of another dtype than the reader's, they are
            copied.
        gain: see `ReceiverOptions.prefix_gain`.
        view: latents for all readers to what this one gets of them; None for all of it.

    Raises:
        ConfigError: none of them; one of them elsewhere than the reader's embeddings, or one that
            this reader cannot take in.
    """

    def __init__(
        self,
        adapter: nn.Module | None,
        deep_prefix: nn.Module | None,
        layers: nn.Module | None = None,
        *,
        reader: Reader,
        gain: float = 1.0,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = [part for part in (adapter, deep_prefix, layers) if part is not None]
        weights = [weight for part in parts for weight in part.parameters()]
        if not weights:
            raise ConfigError(
                "a receiver of payloads needs an adapter, a deep prefix, or both, or updates of "
                "the reader's layers"
            )
        devices = {weight.device for weight in weights} - {reader.device}
        if devices:
            raise ConfigError(
                f"the adapter is on {devices.pop()}, the reader's embeddings on "
                f"{reader.device}; move the adapter there"
            )
        if adapter is not None:
            reader.require("prefixes")
        if deep_prefix is not None:
            reader.require("deep")
        if layers is not None:
            reader.require("layers")
        self._dtype = reader.embedding.weight.dtype
        self._device_type = reader.device.type
        self._gain = gain
        self._view = view
        self.adapter = _in_dtype(adapter, self._dtype)
        self.deep_prefix = _in_dtype(deep_prefix, self._dtype)
        self.layers = _in_dtype(layers, self._dtype)
        # Nothing but the adapter wants the latent, and that takes the codes as they are.
        self._reads_codes = (
            gain == 1.0
            and view is None
            and deep_prefix is None
            and layers is None
            and isinstance(adapter, Attachment)
            and adapter.reads_codes
        )

    def __call__(
        self, inputs: Mapping[str, Tensor], parcel: Parcel, *, mark: Callable[[str], None]
    ) -> Given:
        """What the reader is given of payloads.

        Phases: `dequantise` and `adapter`; both are `adapter` where they are one operation, for a
        linear adapter without a deep prefix and codes of less than 16 bits. Of latents that came
        unpacked, `dequantise` is the change of dtype alone. A caller's `torch.autocast` changes
        nothing here.
        """
        with torch.autocast(self._device_type, enabled=False):
            return self._make(inputs, parcel, mark=mark)

    def _make(
        self, inputs: Mapping[str, Tensor], parcel: Parcel, *, mark: Callable[[str], None]
    ) -> Given:
        header = parcel.header
        unpacked_RMd = inputs.get("latent")
        if self._reads_codes and header.bits != 16 and unpacked_RMd is None:
            assert isinstance(self.adapter, Attachment)
            soft_RMD = self.adapter.of_codes(
                inputs["codes"],
                inputs["scales"],
                bits=header.bits,
                group_size=header.group_size,
                shape=(len(inputs["codes"]), header.latents, header.d_z),
            )
            mark("adapter")
            return Given(soft_RMD)
        if unpacked_RMd is None:
            unpacked_RMd = dequantize(inputs["codes"], inputs["scales"], header)
        if self._view is not None:
            unpacked_RMd = self._view(unpacked_RMd)
        latent_RMd = unpacked_RMd.to(self._dtype)
        mark("dequantise")
        absent_RM = parcel.pieces.absent_RM(latent_RMd.shape[1], device=latent_RMd.device)
        soft = None if self.adapter is None else self.adapter(latent_RMd, gain=self._gain)
        deep = None
        if self.deep_prefix is not None:
            options = {} if absent_RM is None else {"absent_BM": absent_RM}
            deep = self.deep_prefix(latent_RMd, gain=self._gain, **options)
        layers = None if self.layers is None else self.layers(latent_RMd, gain=self._gain)
        mark("adapter")
        return Given(soft, deep, layers)


def _in_dtype(part: nn.Module | None, dtype: torch.dtype) -> nn.Module | None:
    """The module itself, or a copy of it where its weights are of another dtype."""
    if part is None or all(weight.dtype == dtype for weight in part.parameters()):
        return part
    return deepcopy(part).to(dtype).requires_grad_(False)


def put_soft(embeds_BTD: Tensor, soft_ND: Tensor, source_BT: Tensor) -> Tensor:
    """Embeddings with soft tokens in the places where `source_BT` has their number, not -1."""
    if not len(soft_ND):
        return embeds_BTD
    soft_ND = soft_ND.to(embeds_BTD.dtype)
    picked_ND = soft_ND.index_select(0, source_BT.clamp(min=0).flatten())
    return torch.where(source_BT[..., None] < 0, embeds_BTD, picked_ND.view_as(embeds_BTD))
