"""Safetensors files and digests of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentwire_fast.errors import CheckpointError


def parameter_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes; the order of the pairs does not matter."""
    return ordered_digest(sorted(named_tensors, key=lambda pair: pair[0]))


def ordered_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`parameter_digest` of pairs that come in the order of their names, one at a time."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors:
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(head.encode())
        # flatten: a 0-d tensor cannot be viewed as bytes
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; no other format is ever tried.

    Raises:
        CheckpointError: the file is missing or is not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
