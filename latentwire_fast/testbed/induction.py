"""Initial weights that can already copy: a previous-token head and a head that matches on it.

"A B ... A" -> "B" takes two attention heads in two layers (Olsson et al. 2022, "In-context learning
and induction heads"). At this size and budget the pair formed by luck or not at all: after 700
steps on shuffled random chunks a random start copied 0.08 of them, this start 0.84 after 50. So the
readers begin with the circuit, and training keeps what it can use of it.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

CONSTANT = -1  # the embedding coordinate that is the same for every token


@torch.no_grad()
def add_induction_circuit(model: PreTrainedModel, *, sharpness: float = 10.0) -> None:
    """Write the circuit into head 0 of layers 0 and 1; every block's output starts at zero
    otherwise.

    Args:
        model: a Llama-like model with rotary positions (half-split layout) and at least two layers.
        sharpness: logit by which each head prefers its target.
    """
    config = model.config
    width = config.hidden_size
    head = width // config.num_attention_heads
    half = head // 2
    embedding = cast(Tensor, model.get_input_embeddings().weight)
    std = embedding.std().item()
    embedding[:, CONSTANT] = std * math.sqrt(width)
    normed = embedding / embedding.pow(2).mean(-1, keepdim=True).sqrt()
    constant, spread = normed[:, CONSTANT].mean().item(), normed[:, :CONSTANT].std().item()
    layers: Any = model.base_model.layers
    first, second = (layer.self_attn for layer in layers[:2])
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    theta = config.rope_parameters["rope_theta"]
    frequency = theta ** (-torch.arange(0, head, 2) / head)

    # Layer 0: constant queries and keys whose rotations agree at distance one.
    amplitude = math.sqrt(sharpness * math.sqrt(head) / (1 - frequency.cos()).sum()) / constant
    query, key = first.q_proj.weight[:head].zero_(), first.k_proj.weight[:head].zero_()
    query[:half, CONSTANT] = amplitude
    key[:half, CONSTANT] = amplitude * frequency.cos()
    key[half:, CONSTANT] = amplitude * frequency.sin()
    basis = torch.linalg.qr(torch.randn(width - 1, width - 1))[0]
    read, written = basis[:head], basis[head : 2 * head]
    gain = std / spread  # what a head adds is as large as an embedding
    first.v_proj.weight[:head].zero_()[:, :CONSTANT] = read
    first.o_proj.weight[:CONSTANT, :head] = written.T * gain

    # Layer 1: this token against what layer 0 noted at each position, on the slow rotary pairs
    # only, which distance hardly turns; it copies the token found.
    slow = (frequency < 0.02).nonzero()[:, 0]
    slow = torch.cat([slow, slow + half])
    scale = 1.4 * math.sqrt(sharpness * math.sqrt(head) / len(slow)) / spread
    second.q_proj.weight[:head].zero_()[slow, :CONSTANT] = read[: len(slow)] * scale
    second.k_proj.weight[:head].zero_()[slow, :CONSTANT] = written[: len(slow)] * scale
    copied = torch.linalg.qr(torch.randn(width - 1, width - 1))[0][:head]
    second.v_proj.weight[:head].zero_()[:, :CONSTANT] = copied
    second.o_proj.weight[:CONSTANT, :head] = copied.T * (3 * gain)
