"""One batch of a prefill: prompts, and the payloads that they are about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from latentwire_fast.serving.input_buffer import Fields, Layout
from latentwire_fast.serving.payload_batch import Parcel
from latentwire_fast.wire import Header


@dataclass(frozen=True)
class Shape:
    """What one captured graph can serve; M and the deep prefix are the receiver's.

    Attributes:
        payloads: 0 for text, 1 for one that all rows read, or B.
        rows, width: B and T.
        bits, group_size: of the payloads; 0 for text.
    """

    payloads: int
    rows: int
    width: int
    bits: int = 0
    group_size: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts with their payloads, or without: then they are text."""

    layout: Layout
    parcel: Parcel | None

    @property
    def header(self) -> Header | None:
        """Of the payloads."""
        return None if self.parcel is None else self.parcel.header

    @property
    def shape(self) -> Shape:
        """What a graph for this batch must have been captured for."""
        rows, width = self.layout.ids_BT.shape
        if self.parcel is None:
            return Shape(0, rows, width)
        header = self.parcel.header
        return Shape(len(self.parcel.payloads), rows, width, header.bits, header.group_size)

    @property
    def fields(self) -> Fields:
        """Dtypes and shapes of `values`."""
        shape = self.layout.ids_BT.shape
        fields: Fields = {"ids": (torch.int64, shape), "last": (torch.int64, shape[:1])}
        if self.parcel is None:
            return fields
        return {**fields, "source": (torch.int64, shape), **self.parcel.fields}

    def values(self) -> dict[str, np.ndarray]:
        """Everything that the device needs.

        `ids` and `last`: token ids `[B, T]`, and where each prompt ends. With payloads also
        `source` `[B, T]`: which of their soft tokens, counted over all of them, stands there, or
        -1; and their `codes` and `scales`.
        """
        layout = self.layout
        values = {"ids": layout.ids_BT, "last": layout.lengths_B - 1}
        if self.parcel is None:
            return values
        slots_BT = layout.slots_BT
        per_payload = slots_BT.max() + 1
        rows_B1 = np.arange(len(slots_BT))[:, None] if len(self.parcel.payloads) > 1 else 0
        source_BT = np.where(slots_BT < 0, -1, slots_BT + per_payload * rows_B1)
        return {**values, "source": source_BT, **self.parcel.values()}

    def verify(self) -> None:
        """Check the values of the payloads.

        Raises:
            PayloadError: values that no encoder sends.
        """
        if self.parcel is not None:
            self.parcel.verify()
