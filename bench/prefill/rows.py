"""The rows of the prefill benchmark: what each of them is, and what it costs.

Shapes: B rows of a batch, N tokens of a context, M latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from bench.prefill.cost import Pass, PrefillCost, Trained
from latentwire_fast.config.schema import AttachmentConfig
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.shapes import Dims
from latentwire_fast.registry import ADAPTERS, ATTACHMENTS

Method = Literal["text", "latent", "latent_cached", "deep_prefix", "kv_reuse"]
METHODS: tuple[Method, ...] = ("text", "latent", "latent_cached", "deep_prefix", "kv_reuse")
ENGINES = ("eager", "compile", "graph")
# `latent` is timed with the sender's encoder: its weights in a file, or on the device.
COLD, WARM = "load encoder", "encode"
# Bytes of a weight.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Positions of template, question and anchor that a prediction assumes.
TEMPLATE_POSITIONS = 32
# What soft prompts and deep prefixes are made like here: as by default.
SOFT, DEEP = ATTACHMENTS.config("soft"), ATTACHMENTS.config("deep")


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
        """The row's name in tables."""
        names = {
            "text": "text",
            "latent": f"latent, {self.encoder} encoder",
            "latent_cached": "latent, cached payload",
            "deep_prefix": "deep prefix, cached payload",
            "kv_reuse": "KV reuse",
        }
        return names[self.method]

    @property
    def title(self) -> str:
        """The whole row in words."""
        of = [f"{self.reader}, batch {self.batch}: {self.label}", self.engine]
        of += [f"{self.text_tokens} tokens"] if self.text_tokens else []
        of += [f"M = {self.latents}, {self.bits} bits"] if self.latents else []
        return ", ".join(of)


@dataclass(frozen=True)
class Plan:
    """Which rows are asked for.

    Attributes:
        most_tokens: of the texts of a batch together; longer ones are left out.
        sender_batches: batches with rows that have an encoder; None for all.
        kv_limit: bytes of keys and values above which KV reuse is left out.
    """

    methods: tuple[str, ...]
    engines: tuple[str, ...]
    text_tokens: tuple[int, ...]
    latents: tuple[int, ...]
    bits: tuple[int, ...]
    most_tokens: int | None = None
    sender_batches: tuple[int, ...] | None = None
    kv_limit: float = 2**31

    def lengths(self, batch: int) -> tuple[int, ...]:
        """Text lengths of a batch."""
        most = self.most_tokens
        return tuple(n for n in self.text_tokens if most is None or batch * n <= most)

    def rows(self, reader: str, batch: int, dims: Dims, *, element: int) -> Iterator[Row]:
        """The rows of one reader and batch, in the order in which they are made: an engine's text
        first, which its other rows are compared with, and eager rows before graphs. Rows with an
        encoder and of KV reuse come last: where time is short, the others are there.

        All M are there for the last engine, the middle one for the others. A deep prefix is as
        long as M and else costs the same, and the sender's cost does not depend on the receiver's
        engine, bits and hardly on M: their rows are there for the middle M, those with an encoder
        for the first bit width and the last engine.
        """
        middle, last = sorted(self.latents)[len(self.latents) // 2], self.engines[-1]
        for engine in self.engines:
            if "text" in self.methods:
                for tokens in self.lengths(batch):
                    yield Row(reader, "text", engine, batch, tokens)
            for bits in self.bits:
                # The time of a cached payload does not depend on the text that it stands for.
                if "latent_cached" in self.methods:
                    for latents in self.latents if engine == last else (middle,):
                        yield Row(reader, "latent_cached", engine, batch, 0, latents, bits)
                if "deep_prefix" in self.methods and engine != "compile":
                    yield Row(reader, "deep_prefix", engine, batch, 0, middle, bits)
        sends = self.sender_batches is None or batch in self.sender_batches
        if sends and "latent" in self.methods:
            sent = Row(reader, "latent", last, batch, 0, middle, self.bits[0])
            for encoder in ("warm", "cold"):
                for tokens in self.lengths(batch):
                    yield replace(sent, text_tokens=tokens, encoder=encoder)
        if "kv_reuse" in self.methods:
            for tokens in self.lengths(batch):
                held = batch * Pass(dims, batch, tokens, element=element).kv_bytes
                if held <= self.kv_limit:
                    yield Row(reader, "kv_reuse", "eager", batch, tokens)


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of a command line."""
    return Plan(
        methods=tuple(args.methods),
        engines=tuple(sorted(set(args.engines), key=ENGINES.index)),
        text_tokens=tuple(args.text_tokens),
        latents=tuple(args.latents),
        bits=tuple(args.bits),
        most_tokens=args.most_tokens,
        sender_batches=None if args.sender_batches is None else tuple(args.sender_batches),
    )


def adapter_of(args: argparse.Namespace) -> AttachmentConfig:
    """The adapter of a command line."""
    return soft_prompt(args.adapter)


def soft_prompt(adapter: str) -> AttachmentConfig:
    """Soft tokens with an adapter of this kind."""
    return ATTACHMENTS.config("soft", adapter=ADAPTERS.config(adapter))


@dataclass(frozen=True)
class Sizes:
    """The sizes that the cost of a row depends on, besides the row itself.

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
    adapter: AttachmentConfig = SOFT

    def positions(self, row: Row) -> int:
        """Positions that the reader's forward pass computes, per row of the batch."""
        if row.method == "text":
            return self.template + row.text_tokens
        return self.template + (row.latents or 0 if row.method != "deep_prefix" else 0)

    def reader_pass(self, row: Row) -> Pass:
        """The reader's part."""
        past = {"deep_prefix": row.latents or 0, "kv_reuse": row.text_tokens}.get(row.method, 0)
        return Pass(self.dims, row.batch, self.positions(row), past, self.element)

    def cost(self, row: Row) -> PrefillCost:
        """Everything between the request and the first token."""
        reader = self.reader_pass(row)
        if row.method == "text":
            return PrefillCost((reader,), tokens=row.batch * reader.new)
        if row.method == "kv_reuse":
            held = Pass(self.dims, row.batch, row.text_tokens, element=self.element).kv_bytes
            return PrefillCost((reader,), row.batch * held, tokens=row.batch * self.template)
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
        return PrefillCost(tuple(parts), link, tokens=tokens, payloads=row.batch)

    def _trained(self, method: str, slots: int) -> Trained:
        """The adapter or the deep prefix: all weights of its matmuls meet every slot."""
        config = DEEP if method == "deep_prefix" else self.adapter
        weights, launches = _matmuls_of(self.dims, self.d_z, config)
        return Trained(slots, weights, launches, self.element)


@cache
def _matmuls_of(dims: Dims, d_z: int, config: AttachmentConfig) -> tuple[int, int]:
    """Weights of a trained part's matmuls, and about how many launches it takes."""
    rms = ((1.0, 1.0),) * dims.layers
    geometry = KVGeometry(dims.layers, dims.kv_heads, dims.head_width, rms)
    card = ReaderCard(dims.width, embedding_rms=1.0, fingerprint="", kv=geometry)
    with torch.device("meta"):
        part = ATTACHMENTS.part_of(config).build(config, card, latents=1, d_z=d_z)
    matrices = [
        weight.numel()
        for name, weight in part.named_parameters()
        if weight.dim() == 2 and name.rpartition(".")[2] not in ("slots", "gain")
    ]
    return sum(matrices), 3 * len(matrices)
