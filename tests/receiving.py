"""Inputs for receivers in tests: untrained models of one reader, payloads, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import BOTTLENECKS, ENCODERS
from runs import deep, soft

LATENTS, D_Z = 4, 8


def make_model(
    reader: Reader,
    prefix: Any = "soft",
    mode: Literal["context", "pure"] = "context",
    kind: str = "mlp",
    **options: Any,
) -> Interlingua:
    """An untrained model whose prefixes are far from one another.

    Args:
        kind, options: of the adapter of soft tokens.
    """
    encoder = ENCODERS.config("byte", latents=LATENTS, d_z=D_Z, width=16, layers=1, heads=2)
    options |= {"expansion": 2} if kind == "mlp" else {}
    parts = {"soft": soft(kind, **options), "deep": deep(width=16, expansion=2)}
    torch.manual_seed(3)
    model = Interlingua(
        build_encoder(encoder, {}),
        {reader.name: ReaderCard.of(reader)},
        bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=16),
        attachments=list(parts.values()) if prefix == "both" else [parts[prefix]],
        mode=mode,
    )
    return model.eval()


def gpt2_reader(like: Reader, *, positions: int) -> Reader:
    """A tiny GPT-2 with a table of so many positions and the tokenizer of another reader."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(like.tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=positions,
        bos_token_id=None, eos_token_id=like.tokenizer.eos_token_id,
    )  # fmt: skip
    return Reader(GPT2LMHeadModel(config).eval(), like.tokenizer, name="gpt2")


def at_most(tokens: int) -> DecodeOptions:
    return DecodeOptions(max_new_tokens=tokens)


def asking(reader: Reader, questions: Sequence[str], mode: Any = "context") -> list[Prompt]:
    """Prompts with room for a latent."""
    return reader.prompts.build_many([Turn(question) for question in questions], latent=mode)


def random_payloads(model: Interlingua, rows: int = 3, bits: int = 6) -> list[bytes]:
    return model.payloads(torch.randn(rows, LATENTS, D_Z), bits=bits)
