"""A payload's codes to what its reader takes in: soft tokens, keys and values, or both.

Shapes: B rows, T columns, R payloads (1 or B), M latents, d latent width, D `d_model`; L layers, H
key/value heads, P deep positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.attachments.base import Attachment
from latentwire_fast.readers.reader import Reader
from latentwire_fast.wire import Header
from latentwire_fast.wire.payload import dequantize


class TrainedParts:
    """What was trained for one reader.

    Args:
        adapter, deep_prefix: see `Receiver`.

    Raises:
        ConfigError: neither; one of them elsewhere than the reader's embeddings.
    """

    def __init__(
        self, adapter: nn.Module | None, deep_prefix: nn.Module | None, *, reader: Reader
    ) -> None:
        self.adapter, self.deep_prefix = adapter, deep_prefix
        parts = [part for part in (adapter, deep_prefix) if part is not None]
        weights = [weight for part in parts for weight in part.parameters()]
        if not weights:
            raise ConfigError("a receiver needs an adapter, a deep prefix, or both")
        devices = {weight.device for weight in weights} - {reader.device}
        if devices:
            raise ConfigError(
                f"the adapter is on {devices.pop()}, the reader's embeddings on "
                f"{reader.device}; move the adapter there"
            )
        self._dtype = weights[0].dtype
        # Nothing but the adapter wants the latent, and that takes the codes as they are.
        self._reads_codes = (
            deep_prefix is None and isinstance(adapter, Attachment) and adapter.reads_codes
        )

    def __call__(
        self, inputs: Mapping[str, Tensor], header: Header, *, mark: Callable[[str], None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Soft tokens `[R, M, D]` and deep prefix `[L, 2, R, H, P, d_head]`, each if it is trained.

        Phases: `dequantise` and `adapter`; both are `adapter` where they are one operation, for a
        linear adapter without a deep prefix and codes of less than 16 bits.
        """
        if self._reads_codes and header.bits != 16:
            assert isinstance(self.adapter, Attachment)
            soft_RMD = self.adapter.of_codes(
                inputs["codes"],
                inputs["scales"],
                bits=header.bits,
                group_size=header.group_size,
                shape=(len(inputs["codes"]), header.latents, header.d_z),
            )
            mark("adapter")
            return soft_RMD, None
        latent_RMd = dequantize(inputs["codes"], inputs["scales"], header).to(self._dtype)
        mark("dequantise")
        soft = None if self.adapter is None else self.adapter(latent_RMd)
        deep = None if self.deep_prefix is None else self.deep_prefix(latent_RMd)
        mark("adapter")
        return soft, deep


def put_soft(embeds_BTD: Tensor, soft_RMD: Tensor, source_BT: Tensor) -> Tensor:
    """Embeddings with soft tokens in the places where `source_BT` has their number, not -1."""
    soft_ND = soft_RMD.to(embeds_BTD.dtype).flatten(0, 1)
    picked_ND = soft_ND.index_select(0, source_BT.clamp(min=0).flatten())
    return torch.where(source_BT[..., None] < 0, embeds_BTD, picked_ND.view_as(embeds_BTD))
