"""One batch of a prefill: prompts, and what stands in the place of their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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
        payloads: 0 for text, 1 for one that all rows read, or B; each may be several.
        rows, width: B and T, see `buckets.py`.
        bits, group_size: of the payloads; 0 for text.
        latents: slots that a payload holds; 0 for text.
        head: ids whose keys and values the graph holds.
        several: how many payloads each of them is.
    """

    payloads: int
    rows: int
    width: int
    bits: int = 0
    group_size: int = 0
    latents: int = 0
    head: tuple[int, ...] = ()
    several: int = 0


@dataclass(frozen=True)
class Spans:
    """Positions that the trained parts make of one payload.

    Attributes:
        soft, deep: soft tokens, and positions of the deep prefix.
        head: positions before these that hold the start of a prompt, once in each.
    """

    soft: int = 0
    deep: int = 0
    head: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts laid out for a reader.

    Attributes:
        layout: the prompts.
        parcel: the payloads that they are about, or None.
        head: what stands before the prompts, and is not read again.
        embeddings: ready soft tokens `[M_i, D]` of each prompt, or None. Neither: text.
        spans: of the payloads.
    """

    layout: Layout
    parcel: Parcel | None = None
    head: Head | None = None
    embeddings: Sequence[Tensor] | None = None
    spans: Spans = Spans()

    @property
    def header(self) -> Header | None:
        """Of the payloads."""
        return None if self.parcel is None else self.parcel.header

    @property
    def is_even(self) -> bool:
        """Whether all prompts are of one length, so that there is no padding."""
        full = bool((self.layout.lengths_B == self.layout.width).all())
        return full and self.deep_lengths_B is None

    @property
    def is_uniform(self) -> bool:
        """Whether every prompt is about as much: a graph has one number of payloads."""
        if self.parcel is None:
            return True
        return self.parcel.pieces.slots is None and len({*self.parcel.pieces.per_prompt}) == 1

    @cached_property
    def deep_joins(self) -> tuple[np.ndarray, np.ndarray] | None:
        """How the deep prefixes of payloads become those of prompts (`Pieces.deep_sources`); None
        where they are these already."""
        if self.parcel is None or not self.spans.deep or self.parcel.pieces.is_single:
            return None
        return self.parcel.pieces.deep_sources(self.spans.deep, head=self.spans.head)

    @cached_property
    def deep_lengths_B(self) -> np.ndarray | None:
        """Real positions of each row's deep prefix, the last ones; None where there is no
        padding."""
        if self.parcel is None or not self.spans.deep:
            return None
        sizes = self.parcel.pieces.sizes(self.spans.deep)
        return None if len({*sizes}) == 1 else np.array(sizes, np.int64) + self.spans.head

    @property
    def shape(self) -> Shape:
        """The shape that a graph for this batch must have been captured for."""
        rows, width = self.layout.ids_BT.shape
        if self.parcel is None:
            return Shape(0, rows, width)
        header = self.parcel.header
        head = () if self.head is None else self.head.ids
        return Shape(
            self.parcel.messages,
            rows,
            width,
            header.bits,
            header.group_size,
            header.latents,
            head,
            several=self.parcel.pieces.per_prompt[0],
        )

    @property
    def fields(self) -> Fields:
        """Dtypes and shapes of `values`."""
        shape = self.layout.ids_BT.shape
        fields: Fields = {"ids": (torch.int64, shape), "last": (torch.int64, shape[:1])}
        if self.parcel is not None or self.embeddings is not None:
            fields = {**fields, "source": (torch.int64, shape)}
        if self.deep_joins is not None:
            of_deep = (torch.int64, self.deep_joins[0].shape)
            fields = {**fields, "deep_source": of_deep, "deep_by": of_deep}
        return fields if self.parcel is None else {**fields, **self.parcel.fields}

    def values(self) -> dict[str, np.ndarray]:
        """Everything that the device needs, but for `embeddings`.

        `ids` and `last`: token ids `[B, T]`, and where each prompt ends. With soft tokens also
        `source` `[B, T]`: which of them, counted over all payloads, stands there, or -1. With
        payloads also `Parcel.values`, and `deep_source` and `deep_by` of `deep_joins`.
        """
        layout = self.layout
        values = {"ids": layout.ids_BT, "last": layout.lengths_B - 1}
        if self.parcel is None and self.embeddings is None:
            return values
        before_B = np.cumsum(layout.soft_B) - layout.soft_B
        if self.parcel is not None and self.parcel.messages == 1:
            before_B = np.zeros_like(before_B)  # all rows read the same ones
        source_BT = layout.slots_BT + before_B[:, None]
        if self.parcel is not None and self.parcel.pieces.slots is not None and self.spans.soft:
            source_N = np.concatenate(self.parcel.pieces.soft_sources(self.spans.soft))
            source_BT = source_N[np.clip(source_BT, 0, len(source_N) - 1)]
        values |= {"source": np.where(layout.slots_BT < 0, -1, source_BT)}
        if self.deep_joins is not None:
            values |= dict(zip(("deep_source", "deep_by"), self.deep_joins, strict=True))
        return values if self.parcel is None else {**values, **self.parcel.values()}

    def with_rows(self, rows: int) -> Batch:
        """A batch of so many rows, the added ones like the last."""
        if rows == len(self.layout.ids_BT):
            return self
        parcel = None if self.parcel is None else self.parcel.with_rows(rows)
        return replace(self, layout=self.layout.with_rows(rows), parcel=parcel)

    def verify(self) -> None:
        """Check the values of the payloads.

        Raises:
            PayloadError: values that no encoder sends.
        """
        if self.parcel is not None:
            self.parcel.verify()


def deep_positions(parcel: Parcel | None, head: Head | None, spans: Spans) -> int:
    """P, how many positions payloads, or what is kept of the prompts, take before these."""
    if head is not None:
        return len(head.ids)
    if parcel is None or not spans.deep + spans.head:
        return 0
    return spans.head + max(parcel.pieces.sizes(spans.deep))
