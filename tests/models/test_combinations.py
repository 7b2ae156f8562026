"""Slots of one reader's own, several payloads, a number of latents that varies and each way into a
reader, together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import AttachmentConfig, StageConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS, POOLERS
from latentwire_fast.serving import Receiver
from receiving import asking
from runs import changed, deep, soft, tiny_config
from varying import encoder_of

LENGTH = 40  # bytes of a chunk
TEXTS = [
    "Nulnak lives in Bakrim. Fosvun has a red lamp. Selpon is a baker in Nelvok, and 94.",
    "Ro lives in Pada.",
    "Kel is 7 years old. Ro has a blue dog, or so they say.",
]
QUESTIONS = ["Where does Nulnak live?", "What?", "How old is Kel?"]
PARTS: dict[str, tuple[AttachmentConfig, ...]] = {
    "soft and longer deep": (soft(expansion=1), deep(width=16, heads=2, expansion=2, length=9)),
    "coprocessor": (ATTACHMENTS.config("coprocessor", width=16, heads=2, expansion=2),),
}


BOTTLENECKS_OF: dict[str, dict[str, Any]] = {
    "uniform": {"bits": 16, "group_size": 16},
    "uniform, version 2": {"bits": 16, "version": 2},
    "fsq": {"prior": "flat"},
    "residual_vq": {"prior": "flat"},
}


def model_of(
    reader: Reader,
    encoder: Any,
    parts: tuple[AttachmentConfig, ...],
    bottleneck: str = "uniform",
) -> Interlingua:
    private = {} if encoder.config.varies else {reader.name: 2, "another": 3}
    torch.manual_seed(4)
    model = Interlingua(
        encoder,
        {name: ReaderCard.of(reader) for name in {reader.name, *private}},
        bottleneck=BOTTLENECKS.config(bottleneck.split(",")[0], **BOTTLENECKS_OF[bottleneck]),
        attachments=parts,
        mode="context",
        private_slots=private,
    ).eval()
    for part in model.parts(reader.name).values():
        part.start(reader, mode="context", contexts=[])
        if hasattr(part, "gate"):
            torch.nn.init.constant_(part.gate, 0.5)
    return model


def byte_encoder(latents: int = 8) -> Any:
    config = ENCODERS.config("byte", latents=latents, d_z=16, width=16, layers=1, heads=2)
    return build_encoder(config, {})


def assert_batch_is_single(receiver: Receiver, messages: Any) -> torch.Tensor:
    """Each prompt's logits in a batch are those that it has alone."""
    prompts = asking(receiver.reader, QUESTIONS)
    together = receiver.prefill(prompts, payloads=messages).logits_BV
    alone = [
        receiver.prefill([prompt], payloads=[message]).logits_BV
        for prompt, message in zip(prompts, messages, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    return together


@pytest.mark.parametrize("bottleneck", BOTTLENECKS_OF)
@pytest.mark.parametrize("parts", PARTS.values(), ids=list(PARTS))
def test_chunks_of_slots_of_ones_own(
    reader: Reader, parts: tuple[AttachmentConfig, ...], bottleneck: str
) -> None:
    """Chunks that are sent for one reader alone are read as those for all of them."""
    model, name = model_of(reader, byte_encoder(), parts, bottleneck), reader.name
    whole = model.encode_chunks(TEXTS, length=LENGTH)
    own = model.encode_chunks(TEXTS, length=LENGTH, reader=name)
    assert [*map(len, own)] == [*map(len, whole)] == [4, 1, 3]
    assert len(own[0][0]) < len(whole[0][0])
    taken = {model.positions_of(name, message[0]) for message in (whole[0], own[0])}
    assert taken == {model.positions_of(name)} == {9 + 5 if len(parts) == 2 else 5}
    receiver = Receiver.of(model, reader)
    for_all = assert_batch_is_single(receiver, whole)
    assert torch.equal(assert_batch_is_single(receiver, own), for_all)


@pytest.mark.parametrize("bottleneck", ["uniform", "fsq"])
@torch.no_grad()
def test_a_coprocessor_of_fewer_latents(reader: Reader, bottleneck: str) -> None:
    model = model_of(reader, encoder_of(reader), PARTS["coprocessor"], bottleneck)
    texts = [TEXTS[0], "Kel is 7.", TEXTS[1]]
    payloads = model.encode_payloads(texts)
    assert len({*map(len, payloads)}) > 1
    receiver = Receiver.of(model, reader)
    assert_batch_is_single(receiver, payloads)
    assert_batch_is_single(receiver, [payloads, *[[p] for p in payloads[1:]]])


@torch.no_grad()
def test_layers_read_one_payload(reader: Reader) -> None:
    parts = (ATTACHMENTS.config("cross_attention", width=16, heads=2),)
    model = model_of(reader, byte_encoder(), parts)
    payloads, prompts = model.encode_payloads(TEXTS[:2]), asking(reader, QUESTIONS[:1])
    receiver = Receiver.of(model, reader)
    with pytest.raises(ConfigError, match=r"attends to latents between its layers .* send one"):
        receiver.prefill(prompts, payloads=[payloads])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attachments": (ATTACHMENTS.config("cross_attention"),), "data": {"chunk_length": 9}},
            "chunk_length makes several latents of a text, and an attachment between",
        ),
        (
            {"attachments": (ATTACHMENTS.config("cross_attention"),), "varies": True},
            "attachment 'cross_attention' takes M latents of every text",
        ),
        (
            {"attachments": (deep(length=9),), "varies": True},
            r"attachment 'deep' takes M latents of every text.*without a `length`",
        ),
        ({"private_slots": {"llama": 1}, "varies": True}, "private_slots share out M latents"),
        ({"bottleneck": BOTTLENECKS.config("fsq"), "varies": True}, "prior='static' counts"),
        ({"private_slots": {"llama": 1}, "fewer": True}, "latents become fewer, and private_slots"),
    ],
)
def test_what_is_refused_together(
    llama_folder: Path, changes: dict[str, Any], message: str
) -> None:
    changes, stage = {**changes}, StageConfig("s", steps=1, objectives=weighted(answer=1.0))
    if changes.pop("fewer", False):
        changes["stages"] = (replace(stage, name="first", latents=9), stage)
    if changes.pop("varies", False):
        pooler = POOLERS.config("spans")
        changes["encoder"] = {"pooler": pooler, "frozen": True, "tokens_per_latent": 9.0}
    with pytest.raises(ConfigError, match=message):
        changed(tiny_config(llama_folder, stages=(stage,)), **changes)
