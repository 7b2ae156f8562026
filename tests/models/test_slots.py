"""Shared and private slots: who gets which of a latent, and payloads for one reader alone."""

from __future__ import annotations

import pytest
import torch

from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.slots import SHARED, Slots
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS
from latentwire_fast.serving import Receiver
from runs import soft

TEXTS = ["Nulnak is already 94 years old.", "Ro lives in Pada."]


@pytest.mark.parametrize(
    ("latents", "private", "shared"),
    [
        (32, {"llama": 6, "qwen": 6}, 20),
        (40, {"llama": 8, "qwen": 8}, 24),
        (28, {"qwen": 4}, 24),
        (32, {}, 32),
    ],
)
def test_each_reader_gets_the_shared_slots_and_its_own(
    latents: int, private: dict[str, int], shared: int
) -> None:
    slots = Slots(latents, private)
    numbers = torch.arange(latents)[None]
    seen = [slots.of(name, numbers)[0].tolist() for name in ("llama", "qwen", "third")]
    assert slots.shared == shared
    assert all(found[:shared] == list(range(shared)) for found in seen)
    assert [len(found) for found in seen] == [
        shared + private.get(name, 0) for name in ("llama", "qwen", "third")
    ]
    own = [i for found in seen for i in found[shared:]]
    assert own == list(range(shared, latents)), "every slot is somebody's"
    for name in ("llama", "qwen", "third"):
        once = slots.of(name, numbers)
        assert torch.equal(slots.of(name, once), once)
    marks = slots.fingerprints(7)
    assert len(set(marks.values())) == len(marks) == (len(private) + 2 if private else 1)
    assert marks[None] == 7
    assert slots.owner("third") == (SHARED if private else None)


def test_a_latent_of_neither_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 slots for reader 'a', which reads its own 6 or all 8"):
        Slots(8, {"a": 2, "b": 2}).of("a", torch.zeros(1, 5, 4))


@pytest.fixture(scope="module", params=["soft", "deep", "linear"])
def model(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Interlingua:
    """Eight slots, four of them shared and two for each reader, at 6 bits."""
    torch.manual_seed(2)
    attachment = {
        "soft": soft(expansion=1),
        "linear": soft("linear"),
        "deep": ATTACHMENTS.config("deep", width=16, layers=1, heads=2),
    }[request.param]
    return Interlingua(
        build_encoder(ENCODERS.config("byte", latents=8, d_z=16, width=16, layers=1, heads=2), {}),
        {name: ReaderCard.of(reader) for name, reader in readers.items()},
        bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=16),
        attachments=(attachment,),
        mode="context",
        private_slots={"llama": 2, "qwen": 2},
    ).eval()


@torch.no_grad()
def test_a_reader_reads_its_own_payload_as_that_for_all(model: Interlingua, reader: Reader) -> None:
    name = reader.name
    latent = model.encode(TEXTS)
    whole, own = model.payloads(latent), model.payloads(latent, reader=name)
    assert all(len(a) < len(b) for a, b in zip(own, whole, strict=True))
    assert own == model.encode_payloads(TEXTS, reader=name)
    given = model.decode_payloads(own, reader=name)
    assert given.shape == (2, 6, 16)
    assert torch.equal(given, model.slots.of(name, model.decode_payloads(whole, reader=name)))
    for place in ("prefixes", "deep"):
        all_of_it = model.reader_inputs(name, model.decode_payloads(whole))[place]  # type: ignore[literal-required]
        alone = model.reader_inputs(name, given)[place]  # type: ignore[literal-required]
        assert all_of_it is alone is None or torch.equal(all_of_it, alone)
    assert model.positions_of(name) == 6
    receiver = Receiver.of(model, reader)
    prompts = reader.prompts.build_many([Turn("How old?"), Turn("Where?")], latent="context")
    answers = [receiver.generate(prompts, payloads=payloads) for payloads in (whole, own)]
    assert answers[0] == answers[1]
    # What is another reader's own changes nothing.
    other = latent.clone()
    start = 6 if name == "llama" else 4
    other[:, start : start + 2] = 0
    assert receiver.generate(prompts, payloads=model.payloads(other)) == answers[0]


def test_the_wrong_reader_is_refused(model: Interlingua, readers: dict[str, Reader]) -> None:
    own = model.encode_payloads(TEXTS, reader="llama")
    whole = model.encode_payloads(TEXTS)
    message = (
        r"payload 0 is for reader 'llama' alone, with 6 of the 8 slots, and this is reader 'qwen'; "
        r"encode the text for 'qwen', or for all readers"
    )
    with pytest.raises(PayloadError, match=message):
        model.decode_payloads(own, reader="qwen")
    with pytest.raises(PayloadError, match="alone, with 6 of the 8 slots; name the reader that is"):
        model.decode_payloads(own)
    receiver = Receiver.of(model, readers["qwen"])
    prompts = readers["qwen"].prompts.build_many([Turn("How old?")] * 2, latent="context")
    with pytest.raises(PayloadError, match="is for reader 'llama' alone, with 6 of the 8 slots"):
        receiver.generate(prompts, payloads=own)
    with pytest.raises(PayloadError, match="one of it and payload 0 is for all readers"):
        Receiver.of(model, readers["llama"]).generate(prompts, payloads=[own[0], whole[1]])
    with pytest.raises(PayloadError, match="was written by model"):
        receiver.generate(prompts, payloads=_of_another(model, own))
    with pytest.raises(PayloadError, match="was written by model"):
        model.decode_payloads(_of_another(model, own), reader="llama")


def _of_another(model: Interlingua, payloads: list[bytes]) -> list[bytes]:
    """The same payloads as another model marks them."""
    mark = next(i for i in range(65536) if i not in model.fingerprints.values())
    latent = model.decode_payloads(payloads, reader="llama")
    return model.bottleneck.pack(latent, bits=6, fingerprint=mark)
