"""The rows of the prefill benchmark: what each of them is, and what it costs.

Shapes: B rows of a batch, N tokens of a context, M latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from prefill_cost import Pass, Trained, Work
from prefill_shapes import Dims
from torch import nn

from latentwire_fast.adapters import Adapter
from latentwire_fast.config import AdapterConfig
from latentwire_fast.prefix import DeepPrefix, KVGeometry

Method = Literal["text", "latent", "latent_cached", "deep_prefix", "kv_reuse"]
METHODS: tuple[Method, ...] = ("text", "latent", "latent_cached", "deep_prefix", "kv_reuse")
ENGINES = ("eager", "compile", "graph")
# `latent` is timed with the sender's encoder: its weights in a file, or on the device.
COLD, WARM = "load encoder", "encode"
# What adapters and deep prefixes are made like here: as by default.
SOFT, DEEP = AdapterConfig(prefix="soft"), AdapterConfig(prefix="deep")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        encoder: of method `latent`: `cold` or `warm`.
        latents: M; None for text and KV reuse, which have none.
        bits: of the payload; None likewise.
    """

    reader: str
    method: Method
    engine: str
    batch: int
    text_tokens: int
    latents: int | None = None
    bits: int | None = None
    encoder: Literal["cold", "warm"] | None = None

    @property
    def label(self) -> str:
        """As the tables name it."""
        names = {
            "text": "text",
            "latent": f"latent, {self.encoder} encoder",
            "latent_cached": "latent, cached payload",
            "deep_prefix": "deep prefix, cached payload",
            "kv_reuse": "KV reuse",
        }
        return names[self.method]


@dataclass(frozen=True)
class Plan:
    """Which rows are asked for."""

    methods: tuple[str, ...]
    engines: tuple[str, ...]
    text_tokens: tuple[int, ...]
    latents: tuple[int, ...]
    bits: tuple[int, ...]
    # Bytes of keys and values above which KV reuse is left out.
    kv_limit: float = 2**31

    def rows(self, reader: str, batch: int, dims: Dims, *, element: int) -> Iterator[Row]:
        """Those of one reader and batch, every reference before what is compared with it.

        The sender's cost does not depend on the receiver's engine, bits and hardly on M: the rows
        with an encoder are there for the first bit width, the middle M and the last engine.
        """
        middle = sorted(self.latents)[len(self.latents) // 2]
        for engine in self.engines:
            for tokens in self.text_tokens:
                if "text" in self.methods:
                    yield Row(reader, "text", engine, batch, tokens)
            for latents in self.latents:
                for bits in self.bits:
                    for method in ("latent_cached", "deep_prefix"):
                        if method in self.methods and (method, engine) != (
                            "deep_prefix",
                            "compile",
                        ):
                            # Its time does not depend on the text that it stands for.
                            yield Row(reader, method, engine, batch, 0, latents, bits)
        for tokens in self.text_tokens:
            if "latent" in self.methods:
                for state in ("warm", "cold"):
                    yield Row(
                        *(reader, "latent", self.engines[-1], batch, tokens, middle, self.bits[0]),
                        encoder=state,
                    )
            held = batch * Pass(dims, batch, tokens, element=element).kv_bytes
            if "kv_reuse" in self.methods and held <= self.kv_limit:
                yield Row(reader, "kv_reuse", "eager", batch, tokens)


@dataclass(frozen=True)
class Sizes:
    """What the cost of a row depends on besides the row.

    Attributes:
        template: positions of a prompt besides context or latent: template, question, anchor.
        element: bytes of a weight.
        adapter: latent to soft tokens.
    """

    dims: Dims
    encoder: Dims
    d_z: int
    template: int
    element: int
    adapter: AdapterConfig = SOFT

    def positions(self, row: Row) -> int:
        """Positions that the reader's forward pass computes, per row of the batch."""
        if row.method == "text":
            return self.template + row.text_tokens
        return self.template + (row.latents or 0 if row.method != "deep_prefix" else 0)

    def reader_pass(self, row: Row) -> Pass:
        """The reader's part."""
        past = {"deep_prefix": row.latents or 0, "kv_reuse": row.text_tokens}.get(row.method, 0)
        return Pass(self.dims, row.batch, self.positions(row), past, self.element)

    def work(self, row: Row) -> Work:
        """Everything between the request and the first token."""
        reader = self.reader_pass(row)
        if row.method == "text":
            return Work((reader,), tokens=row.batch * reader.new)
        if row.method == "kv_reuse":
            held = Pass(self.dims, row.batch, row.text_tokens, element=self.element).kv_bytes
            return Work((reader,), row.batch * held, tokens=row.batch * self.template)
        slots = row.batch * (row.latents or 0)
        parts: list[Pass | Trained] = [self._trained(row.method, slots), reader]
        link = slots * self.d_z * (row.bits or 16) / 8
        if row.encoder:
            sender = Pass(
                *(self.encoder, row.batch, row.text_tokens + (row.latents or 0), 0, self.element),
                decodes=False,
            )
            parts.insert(0, sender)
            if row.encoder == "cold":
                link += sender.weight_bytes
        tokens = row.batch * (self.template + (row.text_tokens if row.encoder else 0))
        return Work(tuple(parts), link, tokens=tokens, payloads=row.batch)

    def _trained(self, method: str, slots: int) -> Trained:
        """The adapter or the deep prefix: all weights of its matmuls meet every slot."""
        config = DEEP if method == "deep_prefix" else self.adapter
        weights, launches = _matmuls_of(self.dims, self.d_z, config)
        return Trained(slots, weights, launches, self.element)


@cache
def _matmuls_of(dims: Dims, d_z: int, config: AdapterConfig) -> tuple[int, int]:
    """Weights of a trained part's matmuls, and about how many launches it takes."""
    with torch.device("meta"):
        if config.prefix == "deep":
            rms = ((1.0, 1.0),) * dims.layers
            geometry = KVGeometry(dims.layers, dims.kv_heads, dims.head_width, rms)
            part: nn.Module = DeepPrefix(config, latents=1, d_z=d_z, geometry=geometry)
        else:
            part = Adapter(config, latents=1, d_z=d_z, d_model=dims.width, target_rms=1.0)
    matrices = [
        weight.numel()
        for name, weight in part.named_parameters()
        if weight.dim() == 2 and name not in ("slots", "gain")
    ]
    return sum(matrices), 3 * len(matrices)
