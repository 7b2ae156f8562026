"""The formulas against independent oracles: numpy for bytes, fp64 textbook forms for floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentwire_fast import reference

CODES = [(bits, group) for bits in (8, 6, 4) for group in (16, 32, 64)]


def quantize_numpy(
    values: np.ndarray, bits: int, group_size: int
) -> tuple[list[list[int]], list[np.float16]]:
    """The quantiser one group and one value at a time."""
    qmax = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for start in range(0, len(values), group_size):
        group = values[start : start + group_size].astype(np.float32)
        scale = np.float16(min(np.abs(group).max() / np.float32(qmax), np.float32(65504)))
        step = np.float32(scale)
        exact = [v / step if step > 0 else np.float32(0) for v in group]
        codes.append([int(min(max(np.rint(e), -qmax), qmax)) for e in exact])
        scales.append(scale)
    return codes, scales


def pack_python(codes: list[list[int]], bits: int) -> bytes:
    """The byte layout, group by group, as strings of binary digits."""
    packed = bytearray()
    for group in codes:
        planes = {8: [(0, 8)], 6: [(0, 4), (4, 2)], 4: [(0, 4)]}[bits]
        for low, width in planes:
            parts = [((code % 2**bits) >> low) % 2**width for code in group]
            for i in range(0, len(parts), 8 // width):
                byte = parts[i : i + 8 // width]
                packed.append(sum(part << (width * k) for k, part in enumerate(byte)))
    return bytes(packed)


@pytest.mark.parametrize(("bits", "group"), CODES)
@pytest.mark.parametrize("values", [1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 127])
def test_codes_scales_and_bytes_are_those_of_the_formula(
    bits: int, group: int, values: int
) -> None:
    z = torch.randn(values) * torch.logspace(-6, 5, values)
    codes, scales = quantize_numpy(z.numpy(), bits, group)
    packed, found = reference.quantize_pack(z[None], bits=bits, group_size=group)
    assert found[0].numpy().tobytes() == np.array(scales).tobytes()
    assert packed[0].numpy().tobytes() == pack_python(codes, bits)
    assert packed.shape[1] == reference.code_bytes(values, bits=bits, group_size=group)
    unpacked = reference.unpack_codes(packed, values=values, bits=bits, group_size=group)
    assert unpacked[0].tolist() == [code for group_codes in codes for code in group_codes]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_packed_group_by_hand(bits: int) -> None:
    """16 values with scale 1 and a short group of 3, written out."""
    qmax = 2 ** (bits - 1) - 1
    z = torch.tensor([qmax, -1, 2, -2, *[0] * 12, qmax, -qmax, 1], dtype=torch.float32)
    packed, scales = reference.quantize_pack(z[None], bits=bits, group_size=16)
    assert scales.tolist() == [[1.0, 1.0]]
    expected = {
        8: "7fff02fe" + "00" * 12 + "7f8101",
        6: "ffe2" + "00" * 6 + "cd" + "00" * 3 + "1f01" + "09",
        4: "f7e2" + "00" * 6 + "9701",
    }
    assert packed[0].numpy().tobytes().hex() == expected[bits]


@pytest.mark.parametrize(("bits", "group"), CODES)
@given(data=st.data())
def test_quantisation_is_idempotent(bits: int, group: int, data: st.DataObject) -> None:
    """From scales of qmax times fp16's smallest subnormal upward; below, see the next test."""
    seed = data.draw(st.integers(0, 2**31))
    exponent = data.draw(st.integers(-5, 12))
    values = data.draw(st.integers(1, 3 * group))
    z = torch.randn(1, values, generator=torch.Generator().manual_seed(seed)) * 4.0**exponent
    codes, scales = reference.quantize_pack(z, bits=bits, group_size=group)
    if ((scales > 0) & (scales < 2 ** (bits - 1) * 2.0**-24)).any():
        return
    once = reference.unpack_dequantize(
        codes, scales, bits=bits, group_size=group, values=values, dtype=torch.float32
    )
    again = reference.quantize_pack(once, bits=bits, group_size=group)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert torch.equal(reference.fake_quantize(z, bits=bits, group_size=group), once)


def test_a_tiny_scale_is_rounded_too_coarsely_to_be_idempotent() -> None:
    """The limit that `reference.quantize` states: fp16 subnormals have few bits."""
    z = torch.zeros(1, 16)
    z[0, 0] = 190.6 * 2.0**-24
    once = reference.fake_quantize(z, bits=8, group_size=16)
    assert not torch.equal(reference.fake_quantize(once, bits=8, group_size=16), once)


@pytest.mark.parametrize(("bits", "group"), CODES)
def test_clipping_uses_finer_steps_and_stays_within_half_of_one(bits: int, group: int) -> None:
    """`amax / (qmax + 1/2)`; a gain at 4 bits in groups of 32 or 64, as `ops` says."""
    z = torch.randn(1, 500 * group)
    _, plain = reference.quantize(z, bits=bits, group_size=group)
    codes, scales = reference.quantize(z, bits=bits, group_size=group, clip=True)
    qmax = 2 ** (bits - 1) - 1
    amax = z.unflatten(-1, (-1, group)).abs().amax(-1)
    assert torch.equal(scales, (amax / (qmax + 0.5)).half())
    assert (scales < plain).all()
    assert codes.abs().amax() == qmax
    error = reference.fake_quantize(z, bits=bits, group_size=group, clip=True) - z
    half = scales.double().repeat_interleave(group, -1) / 2
    # fp16's rounding of the scale, times up to qmax steps, may come on top.
    assert (error.abs() <= half * (1 + (2 * qmax + 1) * 2.0**-11)).all()
    coarse = reference.fake_quantize(z, bits=bits, group_size=group) - z
    gains = bits == 4 and group >= 32
    assert (error.square().sum() < 0.98 * coarse.square().sum()) == gains


@pytest.mark.parametrize(("bits", "group"), CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_groups(bits: int, group: int, dtype: torch.dtype) -> None:
    """Zeros, fp32 denormals, the largest numbers: finite values out, codes within range."""
    largest = torch.finfo(dtype).max
    z = torch.zeros(5, group, dtype=dtype)
    z[1] = torch.finfo(dtype).tiny / 4
    z[2, 0] = largest
    z[3] = torch.linspace(-1, 1, group) * largest
    z[4, :2] = torch.tensor([-0.0, 1e-3])
    codes, scales = reference.quantize(z.flatten()[None], bits=bits, group_size=group)
    assert scales.isfinite().all()
    assert (scales >= 0).all()
    assert codes.abs().amax() <= 2 ** (bits - 1) - 1
    assert (codes[0, 0] == 0).all()
    out = reference.fake_quantize(z.flatten()[None].float(), bits=bits, group_size=group)
    assert out.isfinite().all()
    assert (out[0, :group] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_non_finite_value_becomes_nan(bad: float) -> None:
    z = torch.randn(1, 64)
    z[0, 20] = bad
    _, scales = reference.quantize(z, bits=4, group_size=16)
    assert scales.isnan().tolist() == [[False, True, False, False]]
    out = reference.fake_quantize(z, bits=4, group_size=16)
    assert out.isnan().sum() == 16
    assert out[0, 16:32].isnan().all()


def textbook_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """fp64, from the definition."""
    log_p = (teacher.double() / tau).log_softmax(-1)
    log_q = (student.double() / tau).log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1) * tau**2


def losses_and_gradient(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Row losses, and the gradient of their sum."""
    grad = torch.empty_like(student)
    return reference.kd_kl(student, teacher, tau=tau, grad=grad), grad


def logits_at_kl(kl: float, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """fp32 logits whose KL is about `kl`."""
    teacher = torch.randn(shape) * 3
    return teacher + torch.randn(shape) * (2 * kl) ** 0.5, teacher


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("kl", [1e-7, 1e-5, 1e-3, 1e-1, 1.0, 5.0])
@pytest.mark.parametrize("vocabulary", [1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kl_over_its_range(kl: float, tau: float, vocabulary: int, dtype: torch.dtype) -> None:
    """Loss within 5e-5 of fp64 on the same rounded inputs, and the gradient by its own size."""
    student, teacher = (x.to(dtype) for x in logits_at_kl(kl, (8, vocabulary)))
    loss = reference.kd_kl(student, teacher, tau=tau)
    truth = textbook_kl(student, teacher, tau)
    assert (loss > 0).all()
    torch.testing.assert_close(loss.double(), truth, rtol=5e-5, atol=1e-11)

    exact = student.double().requires_grad_()
    textbook_kl(exact, teacher, tau).sum().backward()
    assert exact.grad is not None
    _, grad = losses_and_gradient(student.float(), teacher.float(), tau)
    error = (grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-5


def test_the_naive_fp32_form_is_what_this_replaces() -> None:
    """At KL 5e-5 the textbook form in fp32 loses three digits that the stable one keeps."""
    student, teacher = logits_at_kl(5e-5, (64, 5003))
    truth = textbook_kl(student, teacher, 1.0)
    naive = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    ours = reference.kd_kl(student, teacher, tau=1.0)
    error = {"naive": (naive - truth).abs().max(), "ours": (ours - truth).abs().max()}
    assert error["ours"] < 1e-6 * 5e-5 * 10
    assert error["naive"] > 100 * error["ours"]


def test_kl_of_identical_logits_is_exactly_zero() -> None:
    logits = torch.randn(4, 1000) * 10
    for student in (logits, (logits * 1024).round() / 1024):
        teacher = student if student is logits else student + 64.0  # an exact shift of every logit
        loss, grad = losses_and_gradient(student, teacher, 2.0)
        assert (loss >= 0).all()
        assert loss.max() < 1e-9
        assert grad.abs().max() < 1e-5
    loss, grad = losses_and_gradient(logits, logits, 2.0)
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_kl_with_infinite_logits() -> None:
    """p = 0 counts through q alone; a token that the student lacks leaves both distributions."""
    student, teacher = torch.randn(3, 50), torch.randn(3, 50) * 3
    teacher[0, :7] = -torch.inf
    student[1, 40:] = -torch.inf
    student[2, 40:] = teacher[2, 40:] = -torch.inf
    loss, grad = losses_and_gradient(student, teacher, 1.5)
    truth = torch.stack(
        [
            textbook_kl(student[0], teacher[0], 1.5),
            textbook_kl(student[1, :40], teacher[1, :40], 1.5),
            textbook_kl(student[2, :40], teacher[2, :40], 1.5),
        ]
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    q = (student / 1.5).softmax(-1)
    torch.testing.assert_close(grad[0, :7], 1.5 * q[0, :7])
    assert (grad[1:, 40:] == 0).all()
    torch.testing.assert_close(grad.sum(-1), torch.zeros(3), rtol=0, atol=1e-5)


def test_kl_far_apart_stays_finite() -> None:
    """Distributions with disjoint support in fp32: KL is the distance of the logits."""
    student, teacher = torch.zeros(1, 8), torch.zeros(1, 8)
    student[0, 0] = teacher[0, 1] = 500.0
    loss, grad = losses_and_gradient(student, teacher, 1.0)
    assert loss.item() == pytest.approx(500.0)
    torch.testing.assert_close(grad[0, :3], torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize("kl", [5e-3, 5e-5])
def test_difference_stacking_keeps_the_gradient(kl: float) -> None:
    """bf16 hidden states: bf16 logits lose the gradient, stacked differences keep it."""
    width, vocabulary, rows = 128, 5003, 32
    weight = (torch.randn(vocabulary, width) * width**-0.5).bfloat16()
    teacher = torch.randn(rows, width).mul(3).bfloat16()
    student = (teacher.float() + torch.randn(rows, width) * (2 * kl) ** 0.5).bfloat16()
    head = weight.double()
    exact = student.double().requires_grad_()
    textbook_kl(exact @ head.T, teacher.double() @ head.T, 1.0).sum().backward()
    assert exact.grad is not None
    settings = reference.LossSettings(
        *(1.0, 1.0, 0.0, 0.0, vocabulary, 8),
        *(False, True, True, False, False, None),
    )
    (ours,) = reference.linear_losses(
        reference.LossRows(student, None, None, teacher, None),
        reference.Heads(weight, None, None, None),
        settings,
    ).d_hidden
    s, t = student @ weight.T, teacher @ weight.T
    naive = ((s.float().softmax(-1) - t.float().softmax(-1)).bfloat16() @ weight).double()
    norm = exact.grad.norm()
    errors = {
        "ours": (ours - exact.grad).norm() / norm,
        "naive": (naive - exact.grad).norm() / norm,
    }
    assert errors["ours"] < 1e-4
    assert errors["naive"] > 0.05 if kl > 1e-3 else errors["naive"] > 0.5
