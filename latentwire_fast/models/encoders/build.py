"""The encoder that a training starts from: a reader's weights, another LM's, or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from transformers import AutoModel, PreTrainedModel

from latentwire_fast.config.schema import EncoderConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.byte import ByteEncoder
from latentwire_fast.models.encoders.lm import Encoder, LMEncoder
from latentwire_fast.prompts.builder import PromptBuilder, Turn
from latentwire_fast.readers.checks import check_vocabulary, learns_positions
from latentwire_fast.readers.loading import load_tokenizer, load_weights
from latentwire_fast.readers.reader import Reader, checkpoint_activations


def build_encoder(config: EncoderConfig, readers: Mapping[str, Reader]) -> Encoder:
    """A fresh encoder, whose own `config` may read less than the given one.

    An LM encoder copies the weights of the reader with the same source, if any, unless these are
    quantised. It reads no more tokens than an LM with a table of positions has room for.
    """
    if config.kind == "byte":
        return ByteEncoder(config)
    for reader in readers.values():
        if reader.source == config.source and not hasattr(reader.model, "hf_quantizer"):
            core = cast(PreTrainedModel, copy.deepcopy(reader.backbone).float())
            tokenizer = reader.tokenizer
            break
    else:
        core = load_weights(AutoModel, config.source, dtype=torch.float32)
        tokenizer = load_tokenizer(config.source)
        check_vocabulary(tokenizer, core, name=f"encoder LM {config.source!r}")
    if learns_positions(core):
        # all but the text: what a prompt of pure mode has besides it, and the queries
        frame = PromptBuilder(tokenizer).build([Turn("")], context="")
        others = len(frame.ids) - frame.content + config.latents
        room = core.config.get_text_config().max_position_embeddings - others
        if room < 1:
            raise ConfigError(
                f"encoder LM {config.source!r} has no position left for a text beside "
                f"{config.latents} latents; take fewer, or another LM"
            )
        config = replace(config, max_tokens=min(config.max_tokens, room))
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    return LMEncoder(core.train(), tokenizer, config)
