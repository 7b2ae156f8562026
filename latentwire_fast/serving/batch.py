"""One batch of a prefill: prompts, and what stands in the place of their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.serving.input_buffer import Fields, Layout
from latentwire_fast.serving.payload_batch import Parcel
from latentwire_fast.serving.prompt_head import Head
from latentwire_fast.wire import Header


@dataclass(frozen=True)
class Shape:
    """The shape that one captured graph can serve; the deep prefix is the receiver's.

    Attributes:
        payloads: 0 for text, 1 for one that all rows read, or B.
        rows, width: B and T, see `buckets.py`.
        bits, group_size: of the payloads; 0 for text.
        latents: slots that the payloads hold; 0 for text.
        head: ids whose keys and values the graph holds.
    """

    payloads: int
    rows: int
    width: int
    bits: int = 0
    group_size: int = 0
    latents: int = 0
    head: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Prompts laid out for a reader.

    Attributes:
        layout: the prompts.
        parcel: the payloads that they are about, or None.
        head: what stands before the prompts, and is not read again.
        embeddings: ready soft tokens `[M_i, D]` of each prompt, or None. Neither: text.
    """

    layout: Layout
    parcel: Parcel | None = None
    head: Head | None = None
    embeddings: Sequence[Tensor] | None = None

    @property
    def header(self) -> Header | None:
        """Of the payloads."""
        return None if self.parcel is None else self.parcel.header

    @property
    def is_even(self) -> bool:
        """Whether all prompts are of one length, so that there is no padding."""
        return bool((self.layout.lengths_B == self.layout.width).all())

    @property
    def shape(self) -> Shape:
        """The shape that a graph for this batch must have been captured for."""
        rows, width = self.layout.ids_BT.shape
        if self.parcel is None:
            return Shape(0, rows, width)
        header = self.parcel.header
        head = () if self.head is None else self.head.ids
        payloads, precision = len(self.parcel.payloads), (header.bits, header.group_size)
        return Shape(payloads, rows, width, *precision, header.latents, head)

    @property
    def fields(self) -> Fields:
        """Dtypes and shapes of `values`."""
        shape = self.layout.ids_BT.shape
        fields: Fields = {"ids": (torch.int64, shape), "last": (torch.int64, shape[:1])}
        if self.parcel is not None or self.embeddings is not None:
            fields = {**fields, "source": (torch.int64, shape)}
        return fields if self.parcel is None else {**fields, **self.parcel.fields}

    def values(self) -> dict[str, np.ndarray]:
        """Everything that the device needs, but for `embeddings`.

        `ids` and `last`: token ids `[B, T]`, and where each prompt ends. With soft tokens also
        `source` `[B, T]`: which of them, counted over all rows, stands there, or -1. With payloads
        also `Parcel.values`.
        """
        layout = self.layout
        values = {"ids": layout.ids_BT, "last": layout.lengths_B - 1}
        if self.parcel is None and self.embeddings is None:
            return values
        before_B = np.cumsum(layout.soft_B) - layout.soft_B
        if self.parcel is not None and len(self.parcel.payloads) == 1:
            before_B = np.zeros_like(before_B)  # all rows read the same ones
        source_BT = np.where(layout.slots_BT < 0, -1, layout.slots_BT + before_B[:, None])
        values |= {"source": source_BT}
        return values if self.parcel is None else {**values, **self.parcel.values()}

    def with_rows(self, rows: int) -> Batch:
        """A batch of so many rows, the added ones like the last."""
        if rows == len(self.layout.ids_BT):
            return self
        parcel = None if self.parcel is None else self.parcel.with_rows(rows)
        return Batch(self.layout.with_rows(rows), parcel, self.head)

    def verify(self) -> None:
        """Check the values of the payloads.

        Raises:
            PayloadError: values that no encoder sends.
        """
        if self.parcel is not None:
            self.parcel.verify()
