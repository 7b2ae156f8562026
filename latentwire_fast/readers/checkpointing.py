"""Recomputing a frozen reader's activations in backward, with what its cache holds."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from latentwire_fast.readers.kv_cache import decoder_layers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the decoder layers of a model recompute their activations in backward.

    Not with transformers' own switch: that one works in train mode only and takes the cache, and a
    deep prefix with it, from every layer.
    """
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, _Checkpointed):  # a model may be shared, and asked twice
            layer.forward = _Checkpointed(checkpoint, layer.forward, use_reentrant=False)


class _Checkpointed(partial[Any]):
    """The forward pass of a layer that is run again in backward."""
