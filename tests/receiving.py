"""What tests give receivers: untrained models of one reader, payloads, and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from latentwire_fast.config.schema import AdapterConfig, EncoderConfig, QuantizerConfig
from latentwire_fast.models.encoders.build import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader

LATENTS, D_Z = 4, 8


def make_model(
    reader: Reader,
    prefix: Any = "soft",
    mode: Literal["context", "pure"] = "context",
    **adapter: Any,
) -> Interlingua:
    """An untrained model whose prefixes are far from one another."""
    encoder = EncoderConfig(
        kind="byte", latents=LATENTS, d_z=D_Z, byte_width=16, byte_layers=1, byte_heads=2
    )
    torch.manual_seed(3)
    model = Interlingua(
        build_encoder(encoder, {}),
        {reader.name: ReaderCard.of(reader)},
        encoder_config=encoder,
        quantizer=QuantizerConfig(bits=6, group_size=16),
        adapter=AdapterConfig(prefix=prefix, expansion=2, deep_width=16, **adapter),
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
