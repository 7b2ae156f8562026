"""The KV coprocessor: its base is what the reader reads, and the latent changes it by gates."""

from __future__ import annotations

import pytest
import torch

from latentwire_fast.config.schema import Mode
from latentwire_fast.models.attachments.coprocessor import TEXT, KVCoprocessor
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.own_kv import keys_values_in_place
from latentwire_fast.readers.reader import Reader

M, D_Z, P = 4, 8, 6
TURNS = [Turn("Where does Nulnak live?", "Paris")]


def started(reader: Reader, mode: Mode = "context", **options: object) -> KVCoprocessor:
    config = KVCoprocessor.Config(width=16, heads=2, length=P, **options)  # type: ignore[arg-type]
    part = KVCoprocessor(config, latents=M, d_z=D_Z, geometry=reader.kv_geometry).eval()
    part.start(reader, mode=mode, contexts=[])
    return part


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_at_first_a_reader_reads_the_base_and_nothing_else(reader: Reader, mode: Mode) -> None:
    part, latent = started(reader, mode), torch.randn(2, M, D_Z)
    own = keys_values_in_place(reader, mode, TEXT, positions=P)
    assert torch.equal(part(latent), own.expand(-1, -1, 2, -1, -1, -1))
    prompt = reader.prompts.build(TURNS, context="", latent=mode)
    at = prompt.latent_at
    assert at == part.head_positions
    assert part.positions == at + P
    text_ids = (reader.prompts.text_ids(f" {TEXT}") * 2)[:P]
    ids = [*prompt.ids[:at], *text_ids, *prompt.ids[at:]]
    text = Prompt(ids, None, [False] * (at + P) + prompt.is_target[at:])
    none = torch.zeros(1, 0, reader.d_model)
    with torch.no_grad():
        wanted = reader.score([text]).gold_N
        found = reader.score([prompt], prefixes=none, deep=part(latent[:1]), head=at).gold_N
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_open_gates_add_what_is_made_of_the_latent(reader: Reader) -> None:
    part, latent = started(reader), torch.randn(2, M, D_Z)
    base = part(latent)
    with torch.no_grad():
        part.gate[1, 0] = 0.3  # the keys of layer 1
    changed = part(latent) != base
    assert changed[1, 0, ..., part.head_positions :, :].all()
    changed[1, 0, ..., part.head_positions :, :] = False
    assert not changed.any()
    assert part.rms(latent)["kv_gate"] == pytest.approx(
        torch.tensor(0.3).tanh().item() / len(base) / 2
    )
    with torch.no_grad():
        part.gate.fill_(0.3)
    plain, louder = part(latent), part(latent, gain=2.0)
    assert torch.equal(plain[:, 0], louder[:, 0])
    torch.testing.assert_close(louder[:, 1] - base[:, 1], 2 * (plain[:, 1] - base[:, 1]))
    torch.testing.assert_close(part(latent[1:]), plain[:, :, 1:])


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_reach_the_gates_first_and_then_everything(reader: Reader, learned: bool) -> None:
    part = started(reader, learned_base=learned)
    latent = torch.randn(2, M, D_Z, requires_grad=True)
    names = dict(part.named_parameters())
    assert ("base" in names) == learned
    part(latent).square().sum().backward()
    reached = {name for name, p in names.items() if p.grad is not None and bool(p.grad.any())}
    assert reached == ({"gate", "base"} if learned else {"gate"})
    with torch.no_grad():
        part.gate.fill_(0.1)
    part(latent).square().sum().backward()
    assert all(bool(p.grad.any()) for p in names.values() if p.grad is not None)
    assert latent.grad is not None
    assert bool(latent.grad.any(-1).all())
