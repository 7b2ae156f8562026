"""Models whose number of latents goes by the text's length, for tests."""

from __future__ import annotations

from typing import Any

import torch

from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import BOTTLENECKS, ENCODERS, POOLERS
from runs import deep, soft

LATENTS, D_Z, TOKENS = 6, 8, 5
TEXTS = ["Kel is 7.", "Nulnak has a red cat and Kel a blue dog. " * 3, "Nulnak lives in Paris now."]
POOLED: dict[str, dict[str, Any]] = {
    "queries": {},
    "spans": {},
    "cross_attention": {"heads": 2, "states": 2, "layers": 1},
    "layer_spans": {"heads": 2, "states": 2, "layers": 1},
    "mean": {},
    "convolution": {},
    "selected": {},
}


def encoder_of(reader: Reader, pooler: str = "spans", **options: Any) -> LMEncoder:
    torch.manual_seed(1)
    config = ENCODERS.config(
        "lm", source=reader.source, d_z=D_Z, frozen=True,
        pooler=POOLERS.config(pooler, **POOLED[pooler]),
        **{"latents": LATENTS, "tokens_per_latent": TOKENS, "least_latents": 2, **options},
    )  # fmt: skip
    built = build_encoder(config, {reader.name: reader}).eval()
    assert isinstance(built, LMEncoder)
    return built


def model_of(reader: Reader, **options: Any) -> Interlingua:
    encoder = encoder_of(reader, **options)
    torch.manual_seed(3)
    parts = [soft("film"), deep(width=16, heads=2, expansion=2)]
    return Interlingua(
        encoder,
        {reader.name: ReaderCard.of(reader)},
        bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=16),
        attachments=parts,
        mode="context",
    ).eval()
