"""The quantisation kernels: bytes equal to the reference's, on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

from kernel_device import DEVICE, assert_guards_hold, guard_outputs, needs_kernels
from latentwire_fast import ops, reference
from latentwire_fast.errors import PayloadError

pytestmark = needs_kernels
CODES = [(bits, group) for bits in (8, 6, 4) for group in (16, 32, 64)]


@pytest.mark.parametrize(("bits", "group"), CODES)
@pytest.mark.parametrize("shape", [(3, 96), (2, 4500), (4, 37)])
def test_bytes_and_values_equal_the_reference(
    bits: int, group: int, shape: tuple[int, int]
) -> None:
    z = torch.randn(shape) * torch.logspace(-7, 5, shape[1])
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
    """Packed from that dtype, unpacked to fp32: to bf16 the interpreter cuts off what a GPU rounds,
    so that only a GPU can be held to the reference there."""
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter's Inf * 0
def test_non_finite_values(bad: float) -> None:
    z = torch.randn(2, 1, 64)
    z[1, 0, 20] = bad
    with ops.backend("triton"):
        with pytest.raises(PayloadError, match="NaN or Inf"):
            ops.quantize_pack(z.to(DEVICE), bits=4, group_size=16)
        out = ops.fake_quantize(z.to(DEVICE), bits=4, group_size=16)
    expected = ops.fake_quantize(z, bits=4, group_size=16)
    assert torch.equal(out.cpu().isnan(), expected.isnan())


@pytest.mark.parametrize("bits", ops.CODE_BITS)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_group_that_is_not_finite_has_codes_of_0(bits: int, bad: float) -> None:
    """The wire refuses it by its scale; what is stored is the same everywhere all the same."""
    from latentwire_fast.kernels import quantization

    z = torch.randn(2, 64)
    z[1, 20] = bad
    code = {"bits": bits, "group_size": 16}
    length = reference.code_bytes(64, **code)
    codes, scales = quantization.quantize_pack(z.to(DEVICE), **code, code_bytes=length)
    z[1, 16:32] = 0
    expected, scale = reference.quantize_pack(z, **code)
    assert torch.equal(codes.cpu(), expected)
    assert scales[1, 1].isnan()
    scales[1, 1] = 0
    assert torch.equal(scales.cpu(), scale)


def test_every_scale_and_ties_beside_it_give_the_codes_of_a_division() -> None:
    """Groups for every 61st fp16 scale: halves between codes, and their neighbours in fp32."""
    steps = torch.arange(1, 0x7C00, 61, dtype=torch.int16).view(torch.float16).float()
    ties = torch.arange(-61.5, 62) * steps[:, None]
    away = ties.nextafter(ties * 2), ties.nextafter(torch.tensor(0.0))
    z = torch.cat([ties, *away], -1).view(-1, 31, 1)
    z = torch.cat([(127 * steps).repeat_interleave(len(z) // len(steps))[:, None, None], z], 1)
    with ops.backend("triton"):
        found = ops.quantize_pack(z.to(DEVICE), bits=8, group_size=32)
    for f, e in zip(found, ops.quantize_pack(z, bits=8, group_size=32), strict=True):
        assert torch.equal(f.cpu(), e)


@pytest.mark.parametrize(("bits", "group"), CODES)
@pytest.mark.parametrize("clip", [False, True])
def test_extreme_groups(bits: int, group: int, clip: bool) -> None:
    """Zeros, fp32 denormals, scales that fp16 holds as a denormal or not at all; ends of ranges."""
    from latentwire_fast.kernels import quantization

    z = torch.randn(8, group)
    sizes = [0.0, 1e-40, 1e-9, 1e-6, 1e-3, 1.0, 1e7, 3e37]
    z *= torch.tensor(sizes)[:, None] / z.abs().amax(-1, keepdim=True)
    flat = z.reshape(1, -1)[:, :-3]  # the last group is short
    settings = {"bits": bits, "group_size": group, "clip": clip}
    packed, scales = reference.quantize_pack(flat, **settings)
    # The launcher, because the op refuses what ends at the largest scale.
    found = quantization.quantize_pack(flat.to(DEVICE), **settings, code_bytes=packed.shape[1])
    with ops.backend("triton"):
        fake = ops.fake_quantize(flat[:, None].to(DEVICE), **settings)
    assert torch.equal(found[0].cpu(), packed)
    assert torch.equal(found[1].cpu(), scales)
    assert torch.equal(fake.cpu()[:, 0], reference.fake_quantize(flat, **settings))


@pytest.mark.parametrize("bits", ops.CODE_BITS)
@pytest.mark.parametrize("clip", [False, True])
def test_values_beyond_the_largest_scale(bits: int, clip: bool) -> None:
    limit = torch.tensor(reference.largest_value(bits, clip=clip))
    z = torch.randn(2, 1, 64)
    z[1, 0, 20] = limit
    settings = {"bits": bits, "group_size": 16, "clip": clip}
    expected = reference.quantize_pack(z[:, 0], **settings)
    with ops.backend("triton"):
        found = ops.quantize_pack(z.to(DEVICE), **settings)
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]
        z[1, 0, 20] = limit.nextafter(torch.tensor(torch.inf))
        with pytest.raises(PayloadError, match=f"the largest that {bits} bits can carry is"):
            ops.quantize_pack(z.to(DEVICE), **settings)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing_to_quantise(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, device=DEVICE)
    with ops.backend("triton"):
        codes, scales = ops.quantize_pack(z, bits=4, group_size=32)
        out = ops.unpack_dequantize(codes, scales, bits=4, group_size=32, shape=shape)
        fake = ops.fake_quantize(z, bits=4, group_size=32)
    assert codes.numel() == scales.numel() == 0
    assert out.shape == fake.shape == shape


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("values", [77, 96])
def test_nothing_is_written_outside_or_read_unwritten(
    bits: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer is cut out of a poisoned one: the results are the same and the rims whole."""
    from latentwire_fast.kernels import quantization

    z = torch.randn(3, values).to(DEVICE)
    code = {"bits": bits, "group_size": 32}

    def results() -> list[torch.Tensor]:
        length = reference.code_bytes(values, **code)
        codes, scales = quantization.quantize_pack(z, **code, code_bytes=length)
        z_back = quantization.unpack_dequantize(
            codes, scales, **code, values=values, dtype=torch.float32
        )
        return [codes, scales, z_back, quantization.fake_quantize(z, **code)]

    expected = results()
    with monkeypatch.context() as patch:
        buffers = guard_outputs(patch)
        found = results()
    assert len(buffers) == 4
    assert_guards_hold(buffers)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("clip", [False, True])
def test_the_reference_is_the_same_on_a_gpu(bits: int, clip: bool) -> None:
    z = torch.randn(3, 2**20)
    settings = {"bits": bits, "group_size": 32, "clip": clip}
    expected = reference.quantize_pack(z, **settings)
    for found, wanted in zip(reference.quantize_pack(z.cuda(), **settings), expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_more_values_than_32_bits_count(bits: int) -> None:
    """Whole groups, which make one row of the batch, also one just below 2^31; and a short group in
    each long row."""
    for rows, values in ((2**10, 2**21 + 64), (1, 2**31 - 64), (3, 2**30 + 40)):
        z = torch.randn(rows, values, device="cuda", dtype=torch.bfloat16)
        codes, scales = ops.quantize_pack(z[:, None], bits=bits, group_size=64)
        out = ops.unpack_dequantize(
            codes, scales, bits=bits, group_size=64, shape=(rows, 1, values), dtype=torch.bfloat16
        )
        fake = ops.fake_quantize(z[:, None], bits=bits, group_size=64)
        assert torch.equal(out, fake)
        start = values // 64 * 64 - 640
        end = z[-1:, start:]
        packed, expected = reference.quantize_pack(end, bits=bits, group_size=64)
        assert torch.equal(codes[-1:, -packed.shape[1] :], packed)
        assert torch.equal(scales[-1:, -expected.shape[1] :], expected)
        del z, codes, scales, out, fake
