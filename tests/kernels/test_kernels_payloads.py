"""Payloads made and read by the quantisation kernels: the same bytes, values and refusals as by
the reference, on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

from kernel_device import DEVICE, needs_kernels
from latentwire_fast import ops, wire
from latentwire_fast.errors import PayloadError
from latentwire_fast.wire.header import seal

pytestmark = needs_kernels


def latents() -> torch.Tensor:
    latent_BMD = torch.randn(3, 4, 21) * torch.logspace(-6, 3, 21)
    latent_BMD[0, 0] = 0
    return latent_BMD


@pytest.mark.parametrize("bits", wire.BITS)
def test_payloads_are_the_references(bits: int) -> None:
    latent_BMD = latents()
    expected = wire.pack_batch(latent_BMD, bits=bits, group_size=16)
    unpacked_BMD, _ = wire.unpack_batch(expected)
    with ops.backend("triton"):
        assert wire.pack_batch(latent_BMD.to(DEVICE), bits=bits, group_size=16) == expected
        found_BMD, _ = wire.unpack_batch(expected, device=DEVICE)
    assert found_BMD.device.type == DEVICE
    assert torch.equal(found_BMD.cpu(), unpacked_BMD)


@pytest.mark.parametrize(
    ("bits", "at", "value", "message"),
    [
        (16, 1, b"\x00\x7c", "value 1 is NaN, infinite or -0.0"),
        (16, 0, b"\x00\x80", "value 0 is NaN, infinite or -0.0"),
        (6, -1, b"\x00\x7e", "the scale of group 5 is NaN, infinite or has its sign set"),
        (6, -6, b"\x00\x80", "the scale of group 0 is NaN, infinite or has its sign set"),
        (8, 0, bytes(16), "the scale of group 0 is not the one its codes ask for"),
        (6, -6, bytes(2), "code byte 0 is out of range or has padding set"),
    ],
)
def test_values_that_no_latent_is_packed_to_are_refused(
    bits: int, at: int, value: bytes, message: str
) -> None:
    """`at` counts 16-bit words of the body; the CRC is made anew, as an attacker would."""
    payload = wire.pack(torch.randn(4, 24), bits=bits, group_size=16)
    header, body = wire.read_header(payload), bytearray(payload[wire.HEADER_BYTES :])
    start = 2 * at % len(body)
    body[start : start + len(value)] = value
    with ops.backend("triton"), pytest.raises(PayloadError, match=message):
        wire.unpack_batch([seal(header, bytes(body))], device=DEVICE)


@pytest.mark.parametrize("bits", wire.BITS)
def test_a_latent_that_is_not_finite_is_refused(bits: int) -> None:
    latent_BMD = latents().to(DEVICE)
    latent_BMD[1, 2, 3] = torch.nan
    with ops.backend("triton"), pytest.raises(PayloadError, match=r"\[1, 2, 3\] is nan"):
        wire.pack_batch(latent_BMD, bits=bits, group_size=16)
