"""Bottlenecks: what is sent is what training saw, codes are learned and kept in use, bytes are one
per value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire_fast import reference
from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.bottlenecks.codebook import Codebook, CodebookConfig
from latentwire_fast.models.bottlenecks.gradients import pass_gradient
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.wire.frame import FRAME_BYTES

CPU = torch.device("cpu")
M, D = 5, 6
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"version": 2, "group_size": 16},
    "fsq": {"bits": 3, "levels": (8, 5)},
    "vq": {"bits": 5},
    "residual_vq": {"bits": 12, "code_bits": 4, "stages": 3},
    "soft_codebook": {"version": 2, "codes": 40},
}


def build(kind: str, **options: Any) -> Bottleneck:
    config = BOTTLENECKS.config(kind, **KINDS.get(kind, {}) | options)
    torch.manual_seed(3)
    part: Bottleneck = BOTTLENECKS.part_of(config).build(config, latents=M, d_z=D)
    return part.eval()


def latents(count: int = 7, rows: int = M, seed: int = 0) -> Tensor:
    return torch.randn(count, rows, D, generator=torch.Generator().manual_seed(seed))


def assert_sent(part: Bottleneck, latent_BMd: Tensor, bits: int) -> list[bytes]:
    """Payloads of latents, which a fresh decoder turns into what training saw."""
    payloads = part.pack(latent_BMd, bits=bits, fingerprint=0xBEEF)
    found_BMd, headers = part.unpack(payloads, device=CPU)
    assert torch.equal(found_BMd, part(latent_BMd, bits).detach())
    assert {header.fingerprint for header in headers} == {0xBEEF}
    assert {(h.version, h.bits, h.latents, h.d_z) for h in headers} == {
        (2, bits, latent_BMd.shape[1], D)
    }
    return payloads


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["flat", "static", "autoregressive"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_receiver_gets_what_training_saw(kind: str, prior: str) -> None:
    part = build(kind, prior=prior, prior_steps=2, prior_width=8)
    part.fit([latents(40, seed=1)])
    for bits in part.config.rates:
        if bits == 16:  # half precision, whose training rounds the sum of two numbers once more
            continue
        for rows in (M, 2):
            latent_BMd = latents(rows=rows)
            payloads = assert_sent(part, latent_BMd, bits)
            alone = [assert_sent(part, latent_BMd[i : i + 1], bits)[0] for i in range(7)]
            assert alone == payloads


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_makes_payloads_shorter_and_survives_a_save(kind: str) -> None:
    part, flat = build(kind, prior="static"), build(kind, prior="flat")
    few = latents(1, seed=2).expand(400, -1, -1) + 0.05 * latents(400, seed=3)
    part.fit([few[:300]])
    sizes = [
        sum(map(len, p.pack(few[300:], bits=p.config.bits, fingerprint=1))) for p in (part, flat)
    ]
    assert sizes[0] <= 0.8 * sizes[1]
    again = build(kind, prior="static")
    again.pack(few[:1], bits=again.config.bits, fingerprint=1)  # with the rows before the load
    again.load_state_dict(part.state_dict())
    bits = part.config.bits
    assert again.pack(few, bits=bits, fingerprint=1) == part.pack(few, bits=bits, fingerprint=1)
    before, after = build(kind, prior="static").format_tensors(), part.format_tensors()
    assert before.keys() == after.keys()
    assert not torch.equal(before["frequencies_S"], after["frequencies_S"])


def test_16_bits_are_half_precision() -> None:
    part = build("uniform")
    payloads = part.pack(latents(), bits=16, fingerprint=0)
    assert torch.equal(part.unpack(payloads, device=CPU)[0], latents().half().float())
    assert all(len(payload) <= FRAME_BYTES + 2 * M * D + 2 for payload in payloads)


@pytest.mark.parametrize("kind", ["uniform", "soft_codebook"])
@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_version_2_carries_what_version_1_does_in_fewer_bytes(kind: str, bits: int) -> None:
    first, second = build(kind, version=1, prior="flat"), build(kind, prior="flat")
    payloads = [part.pack(latents(), bits=bits, fingerprint=1) for part in (first, second)]
    decoded = [part.unpack(p, device=CPU)[0] for part, p in zip((first, second), payloads)]  # noqa: B905
    assert torch.equal(*decoded)
    assert sum(map(len, payloads[1])) < sum(map(len, payloads[0])) - 7 * 6
    # A model that writes version 2 reads version 1 as well.
    assert torch.equal(second.unpack(payloads[0], device=CPU)[0], decoded[0])


@pytest.mark.parametrize("bits", [2, 3])
def test_packing_few_bits_reaches_a_fixed_point_for_every_small_scale(bits: int) -> None:
    """As at 4 bits and more (`test_payload.py`): the second result is quantised to itself."""
    part = build("uniform", group_size=16)
    assert isinstance(part, SymbolBottleneck)
    unit, qmax = 2.0**-24, reference.largest_code(bits)
    steps_N = torch.arange(1, 1200) * unit * qmax / 8
    latent_BMd = torch.zeros(len(steps_N), M, D)
    latent_BMd[:, 0, 0], latent_BMd[:, 0, 1] = steps_N, -0.6 * steps_N
    symbols_BN = part.symbols(latent_BMd, bits)
    assert part.values(symbols_BN, bits, M).shape == latent_BMd.shape  # or it raises


def test_values_beyond_the_range_are_named() -> None:
    for bits, value in ((16, 7e4), (4, 7 * 65505.0), (2, math.inf), (6, math.nan)):
        with pytest.raises(PayloadError, match=r"the latent at \[0, .*\] is"):
            build("uniform").pack(torch.full((1, M, D), value), bits=bits, fingerprint=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_sent_is_refused(kind: str) -> None:
    part = build(kind)
    bits = part.config.bits
    with pytest.raises(PayloadError, match="bits=7; this bottleneck sends"):
        part.pack(latents(), bits=7, fingerprint=0)
    with pytest.raises(PayloadError, match="M is 6; this model has 1 to 5 latents"):
        part.pack(torch.zeros(1, M + 1, D), bits=bits, fingerprint=0)
    with pytest.raises(PayloadError, match="are 7 wide, this bottleneck's are 6"):
        part.pack(torch.zeros(1, M, D + 1), bits=bits, fingerprint=0)
    with pytest.raises(PayloadError, match="no payloads"):
        part.unpack([], device=CPU)
    mixed = [part.pack(latents(1, rows), bits=bits, fingerprint=0)[0] for rows in (M, 2)]
    with pytest.raises(PayloadError, match=r"payload 1 has \(M, bits\) \(2, .*unpack them one by"):
        part.unpack(mixed, device=CPU)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("uniform", {"bits": 3}, "bits=3, expected 16, 8, 6 or 4"),
        ("uniform", {"version": 3}, "version=3, expected 1 or 2"),
        ("uniform", {"prior": "static"}, "prior='static' needs version=2"),
        ("uniform", {"prior": "autoregressive"}, "prior='autoregressive' needs version=2"),
        (
            "uniform",
            {"version": 2, "bits": 16, "prior": "autoregressive"},
            "prior='autoregressive' needs codes: bits=16 sends the values themselves; take",
        ),
        ("vq", {"prior_width": 0}, "prior_width=0, expected at least 1"),
        ("vq", {"prior_width": 2000}, "prior_width=2000, expected up to 1024"),
        ("uniform", {"version": 2, "prior_texts": 0}, "prior_texts=0"),
        ("fsq", {"bits": 9}, "bits=9, expected 1 to 8"),
        ("fsq", {"levels": (8, 1)}, "levels=1, expected 2 to 4096"),
        ("fsq", {"levels": (9, 5)}, r"bits=3, expected 4: the largest of levels=\(9, 5\) needs"),
        ("vq", {"bits": 13}, "bits=13, expected 1 to 12"),
        ("vq", {"commitment": -1.0}, "commitment=-1.0"),
        ("vq", {"decay": 1.0}, "decay=1.0"),
        ("vq", {"dead_below": 1.0}, "dead_below=1.0"),
        ("vq", {"update": "none"}, "update='none', expected 'gradient' or 'ema'"),
        ("residual_vq", {"bits": 13}, "bits=13, expected 36, 27, 18 or 9"),
        ("residual_vq", {"stages": 0}, "stages=0"),
        ("residual_vq", {"dropout": 2.0}, "dropout=2.0"),
        ("vq", {"running_prior": True}, "running_prior=True needs prior='static' or 'auto"),
        ("fsq", {"running_prior": True, "prior": "flat"}, "running_prior=True needs prior='st"),
        (
            "uniform",
            {"version": 2, "prior": "static", "bits": 16, "running_prior": True},
            "running_prior=True needs codes: bits=16",
        ),
        ("soft_codebook", {"codes": 1}, "codes=1, expected 2 to 4096"),
        ("soft_codebook", {"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_settings_that_cannot_work_are_named(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BOTTLENECKS.config(kind, **options)


# --- formulas -------------------------------------------------------------------------------------


def test_nearest_codes_are_the_nearest_the_first_of_equals() -> None:
    rows, codes = latents(40).reshape(-1, D).double(), latents(9, seed=4).reshape(-1, D).double()
    codes[7] = codes[30]
    found = reference.nearest_codes(rows, codes)
    assert torch.equal(found, torch.cdist(rows, codes).argmin(-1))
    assert torch.equal(reference.nearest_codes(codes[30:31], codes), torch.tensor([7]))
    assert len(reference.nearest_codes(rows[:0], codes)) == 0


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16])
def test_levels_reach_both_ends_and_keep_zero(count: int) -> None:
    z, counts = torch.linspace(-20, 20, 4001).double()[:, None], torch.tensor([count])
    levels = reference.bounded(z, counts).round() + count // 2
    assert levels.unique().tolist() == list(range(count))
    values = reference.level_values(levels, counts)
    assert values.min() == -1
    assert values[2000] == 0
    assert (values.diff(dim=0) >= 0).all()


def test_the_rotation_turns_gradients_as_it_turns_the_latent() -> None:
    source, chosen = latents(1)[0].requires_grad_(), latents(1, seed=5)[0]
    assert torch.equal(pass_gradient(source, chosen, "rotation"), chosen)
    for row in range(M):
        jacobian = torch.autograd.functional.jacobian(
            lambda z: pass_gradient(z, chosen[row], "rotation"),  # noqa: B023
            source[row].detach(),
        )
        assert isinstance(jacobian, Tensor)
        scale = chosen[row].norm() / source[row].norm()
        turned = jacobian / scale
        assert torch.allclose(turned @ turned.T, torch.eye(D), atol=1e-5)
        assert torch.allclose(jacobian @ source[row], chosen[row], atol=1e-5)
    (straight,) = torch.autograd.grad(pass_gradient(source, chosen, "straight").sum(), source)
    assert torch.equal(straight, torch.ones(M, D))
    zero = torch.zeros(1, D, requires_grad=True)
    (at_zero,) = torch.autograd.grad(pass_gradient(zero, chosen[:1], "rotation").sum(), zero)
    assert torch.equal(at_zero, torch.ones(1, D))


# --- codebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_codebook_moves_to_what_it_is_shown_and_keeps_its_codes_in_use(update: str) -> None:
    config = BOTTLENECKS.config("vq", bits=3, update=update, decay=0.8)
    torch.manual_seed(0)
    book = Codebook(config, 8, D)
    centres = 5 * latents(2, 4, seed=6).reshape(8, D)
    optimizer = torch.optim.SGD([p for p in book.parameters() if p.requires_grad] or [zeros()], 1.0)
    for step in range(80):
        rows = centres.repeat(8, 1) + 0.1 * latents(64, 1, seed=step).flatten(0, 1)
        optimizer.zero_grad()
        if update == "gradient":
            book.loss_B(rows[None], book.codes_Kd[book.nearest(rows)][None]).sum().backward()
            optimizer.step()
        book.learn(rows)
    distances = torch.cdist(centres, book.codes_Kd.detach()).amin(-1)
    assert distances.max() < 0.5, distances
    assert book.codes_Kd.requires_grad == (update == "gradient")
    assert torch.allclose(book.share_K, torch.full((8,), 0.125), atol=0.06)


def zeros() -> Tensor:
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(("kind", "update"), [("vq", "gradient"), ("residual_vq", "ema")])
def test_losses_reach_latents_and_codes(kind: str, update: str) -> None:
    part = build(kind, update=update).train()
    latent_BMd = latents().requires_grad_()
    sent = part.send(latent_BMd, part.config.bits)
    assert sent.loss_B is not None
    assert sent.loss_B.shape == (7,)
    sent.loss_B.sum().backward()
    assert latent_BMd.grad is not None
    assert latent_BMd.grad.abs().sum() > 0
    trained = [p for p in part.parameters() if p.requires_grad]
    assert bool(trained) == (update == "gradient")
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_quantiser_dropout_is_of_training_only() -> None:
    part = build("residual_vq", dropout=1.0)
    latent_BMd = latents(200)
    exact = part(latent_BMd, 12)
    torch.manual_seed(1)
    dropped = part.train()(latent_BMd, 12)
    of_rates = [part.eval()(latent_BMd, bits) for bits in (4, 8, 12)]
    which = [(dropped == of_rate).flatten(1).all(1) for of_rate in of_rates]
    assert torch.equal(of_rates[2], exact)
    assert torch.stack(which).any(0).all()
    assert all(w.sum() > 30 for w in which)


def test_usage_and_perplexity_of_codes() -> None:
    part = build("vq")
    assert isinstance(part.config, CodebookConfig)
    one = part.describe(latents(1)[:, :1].expand(9, M, D))["0"]
    assert one == {"usage": 1 / 32, "perplexity": pytest.approx(1.0)}
    many = part.describe(latents(200))["0"]
    assert 3 < many["perplexity"] < 32
    assert many["perplexity"] / 32 < many["usage"] <= 1
    assert part.describe(torch.full((1, M, D), math.nan)) == {}
    assert set(build("fsq").describe(latents())) == {"channel"}
    assert set(build("residual_vq").describe(latents())) == {"0", "1", "2"}
    assert build("uniform", version=1, prior="flat").describe(latents()) == {}


# --- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "fsq", "soft_codebook"])
def test_the_rate_is_what_symbols_cost_and_falls_along_its_gradient(kind: str) -> None:
    part = build(kind, prior="static", running_prior=True, bits=3)
    assert isinstance(part, SymbolBottleneck)
    assert part.learns
    assert part.measures_rate
    latent_BMd = 0.7 * latents(30)
    flat = part.rate(latent_BMd, 3)
    values = M * D if kind != "fsq" else M * D / 2 * math.log2(8 * 5) / math.log2(7)
    assert flat.tolist() == pytest.approx([values * math.log2(7)] * 30, rel=1e-4)
    for _ in range(300):
        part.learn(latent_BMd, 3)
    moved = latent_BMd.clone().requires_grad_()
    rates = [part.rate(latent_BMd, 3).sum()]
    assert rates[0] < 0.97 * flat.sum()  # of random latents
    for _ in range(60):
        loss = part.rate(moved, 3).sum()
        (grad,) = torch.autograd.grad(loss, moved)
        moved.data -= 0.02 * grad / grad.abs().mean()
        rates.append(loss.detach())
    assert rates[-1] < 0.85 * rates[0]
    part.fit([latent_BMd])
    sizes = [
        sum(map(len, part.pack(z.detach(), bits=3, fingerprint=0))) for z in (latent_BMd, moved)
    ]
    assert sizes[1] < sizes[0]


def test_the_running_prior_is_saved_and_is_the_share_of_what_came() -> None:
    part = build("fsq", prior="static", running_prior=True, bits=3)
    for _ in range(600):
        part.learn(latents(50), 3)
    assert isinstance(part, SymbolBottleneck)
    assert part.running is not None
    symbols = part.symbols(latents(50), 3)[:, 1]
    share = torch.bincount(symbols, minlength=5) / 50
    assert torch.allclose(part.running.share_S[8:13], share, atol=0.01)
    again = build("fsq", prior="static", running_prior=True, bits=3)
    again.load_state_dict(part.state_dict())
    assert torch.equal(again.rate(latents(), 3), part.rate(latents(), 3))
