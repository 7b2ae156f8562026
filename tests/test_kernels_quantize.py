"""The quantisation kernels: bytes equal to the reference's, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_device import DEVICE, needs_kernels
from latentwire_fast import ops, reference
from latentwire_fast.errors import PayloadError

pytestmark = needs_kernels
CODES = [(bits, group) for bits in (8, 6, 4) for group in (16, 32, 64)]


@pytest.mark.parametrize(("bits", "group"), CODES)
@pytest.mark.parametrize("shape", [(3, 96), (2, 4500), (4, 37)])
def test_bytes_and_values_equal_the_reference(
    bits: int, group: int, shape: tuple[int, int]
) -> None:
    z = torch.randn(shape) * torch.logspace(-7, 6, shape[1])
    z[0, : group // 2] = 0
    packed, scales = reference.quantize_pack(z, bits=bits, group_size=group)
    with ops.backend("triton"):
        found = ops.quantize_pack(z[:, None].to(DEVICE), bits=bits, group_size=group)
        out = ops.unpack_dequantize(
            *found, bits=bits, group_size=group, shape=(shape[0], 1, shape[1])
        )
        fake = ops.fake_quantize(z[:, None].to(DEVICE), bits=bits, group_size=group)
    assert torch.equal(found[0].cpu(), packed)
    assert torch.equal(found[1].cpu(), scales)
    assert torch.equal(out.cpu()[:, 0], reference.fake_quantize(z, bits=bits, group_size=group))
    assert torch.equal(out, fake)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_half_precision_and_strided_inputs(dtype: torch.dtype, bits: int) -> None:
    z = torch.randn(20, 3, 7).to(dtype).transpose(0, 1)
    packed, scales = ops.quantize_pack(z, bits=bits, group_size=16)
    with ops.backend("triton"):
        found = ops.quantize_pack(z.to(DEVICE), bits=bits, group_size=16)
        out = ops.unpack_dequantize(*found, bits=bits, group_size=16, shape=tuple(z.shape))
    assert torch.equal(found[0].cpu(), packed)
    assert torch.equal(found[1].cpu(), scales)
    assert torch.equal(
        out.cpu(), ops.unpack_dequantize(packed, scales, bits=bits, group_size=16, shape=z.shape)
    )


def test_rounding_is_half_to_even() -> None:
    """Ties, where a wrong rounding mode or an approximate division shows."""
    z = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, *[0.0] * 8]])
    with ops.backend("triton"):
        codes, _ = ops.quantize_pack(z.to(DEVICE), bits=8, group_size=16)
    codes = codes.view(torch.int8).tolist()
    assert codes[:8] == [127, 0, 2, 2, 0, -2, -2, 64]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values(bad: float) -> None:
    z = torch.randn(2, 1, 64)
    z[1, 0, 20] = bad
    with ops.backend("triton"):
        with pytest.raises(PayloadError, match="NaN or Inf"):
            ops.quantize_pack(z.to(DEVICE), bits=4, group_size=16)
        out = ops.fake_quantize(z.to(DEVICE), bits=4, group_size=16)
    expected = ops.fake_quantize(z, bits=4, group_size=16)
    assert torch.equal(out.cpu().isnan(), expected.isnan())


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_nothing_is_written_outside_the_outputs(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are cut out of guarded buffers; the guards keep their bytes."""
    guards: list[torch.Tensor] = []

    new_empty = torch.Tensor.new_empty

    def guarded(self: torch.Tensor, size: tuple[int, ...], **options: Any) -> torch.Tensor:
        if "dtype" not in options:  # the interpreter's own
            return new_empty(self, size, **options)
        count = torch.Size(size).numel()
        buffer = torch.full((count + 128,), 77, device=self.device, **options)
        guards.append(buffer)
        return buffer[64 : 64 + count].view(size)

    z = torch.randn(3, 77)
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    from latentwire_fast.kernels import quantize

    length = reference.code_bytes(77, bits=bits, group_size=32)
    codes, scales = quantize.quantize_pack(
        z.to(DEVICE), bits=bits, group_size=32, code_bytes=length
    )
    quantize.unpack_dequantize(
        codes, scales, bits=bits, group_size=32, values=77, dtype=torch.float32
    )
    assert len(guards) == 3
    for buffer in guards:
        assert (buffer[:64] == 77).all()
        assert (buffer[-64:] == 77).all()
