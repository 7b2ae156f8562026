"""The prefill engine with the kernels: the same first token as with their reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import runs
from kernel_device import DEVICE, KERNELS, needs_kernels
from latentwire_fast import ops, wire
from latentwire_fast.models.attachments.soft import SoftPrompt
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import PayloadKind, Receiver, ReceiverOptions
from readers import tiny_model

LATENTS, D_Z = 4, 24


@needs_kernels
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "linear"},
        {"adapter": "linear", "calibration": "example"},
        {"adapter": "mlp", "expansion": 2},
    ],
)
def test_payloads_to_a_first_token(
    readers: dict[str, Reader], settings: dict[str, Any], bits: int
) -> None:
    tokenizer: PreTrainedTokenizerBase = readers["qwen"].tokenizer
    reader = Reader(tiny_model("qwen2", tokenizer).to(DEVICE), tokenizer, name="qwen")
    shape = {"latents": LATENTS, "d_z": D_Z}
    adapter = SoftPrompt(runs.soft(**settings), **shape, d_model=reader.d_model, target_rms=0.5).to(
        DEVICE
    )
    receiver = Receiver(
        reader,
        adapter,
        payload_kind=PayloadKind(**shape, fingerprint=7),
        options=ReceiverOptions(engine="eager"),
    )
    latent_BMd = torch.randn(2, LATENTS, D_Z)
    payloads = wire.pack_batch(latent_BMd, bits=bits, group_size=32, fingerprint=7)
    turns = [Turn("Where?"), Turn("Who is a baker in Bakrim?")]
    prompts = reader.prompts.build_many(turns, latent="context")
    logits = {}
    for name in ("reference", KERNELS):
        with ops.backend(name):
            logits[name] = receiver.prefill(prompts, payloads=payloads).logits_BV
    # What the kernels' arithmetic is off by (see test_kernels_projection.py), times what the reader
    # makes of it.
    largest = float(logits["reference"].abs().max())
    torch.testing.assert_close(logits[KERNELS], logits["reference"], rtol=1e-4, atol=1e-4 * largest)
