"""The kernels of cross-entropy, alone and beside the distillation, on a GPU or interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_device import DEVICE, needs_kernels
from latentwire_fast import ops

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

V = 2101  # two tiles; rows that are not aligned


def run(backend: str, inputs: dict[str, Any], leaves: list[str], **settings: Any) -> list[Tensor]:
    """Losses, what is correct, and the gradients of their weighted sum, in fp64 on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    moved = {k: v.detach().clone().to(device) for k, v in inputs.items() if v is not None}
    sources = [moved[name].requires_grad_() for name in leaves]
    with ops.backend(backend):
        losses = ops.linear_cross_entropy_kd(**moved, **settings)
        total = (0.7 * losses.cross_entropy + 1.3 * losses.kd).sum()
        grads = torch.autograd.grad(total, sources)
    return [x.detach().double().cpu() for x in (*losses, *grads)]


def inputs_of(dtype: torch.dtype, *, separate: bool, bias: float | None) -> dict[str, Any]:
    """5 rows of which one has no label, one no teacher (but NaN), one neither; a padded head."""
    width = 16
    hidden = torch.randn(5, width)
    teacher = hidden + 0.3 * torch.randn(5, width)
    hidden[3] = teacher[1] = teacher[3] = math.nan
    inputs = {
        "hidden": hidden.to(dtype),
        "teacher_hidden": teacher.to(dtype),
        "weight": (torch.randn(V + 20, width) * 0.5).to(dtype),
        "labels": torch.tensor([3, 2000, -1, -100, 9]),
        "label_weights": torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5]),
        "kd_weights": torch.tensor([True, False, True, False, True]),
    }
    if bias is not None:
        inputs["bias"] = torch.randn(V + 20)
        inputs["bias"][7] = bias
    if separate:
        inputs["teacher_weight"] = (torch.randn(V + 3, width) * 0.5).to(dtype)
    return inputs


@pytest.mark.parametrize(
    ("dtype", "separate", "softcap", "bias"),
    [
        (torch.float32, False, None, -math.inf),
        (torch.float32, True, 3.0, None),
        (torch.float16, False, 3.0, 0.0),
        (torch.float16, True, None, -math.inf),
    ],
    ids=str,
)
def test_both_losses_equal_the_reference(
    dtype: torch.dtype, separate: bool, softcap: float | None, bias: float | None
) -> None:
    """F17, F21: heads with a bias and with rows that are no tokens; gradients of the head too."""
    inputs = inputs_of(dtype, separate=separate, bias=bias)
    leaves = ["hidden", "weight", *(["bias"] if bias is not None else [])]
    settings = {"softcap": softcap, "scale": 0.5, "label_smoothing": 0.1, "tau": 2.0}
    settings |= {"vocabulary": V, "chunk_rows": 2}
    ours = run("triton", inputs, leaves, **settings)
    expected = run("reference", inputs, leaves, **settings)
    for found, wanted in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(found, wanted, rtol=5e-5, atol=0)
    loose = 1e-4 if dtype == torch.float32 else 3e-3
    for found, wanted in zip(ours[3:], expected[3:], strict=True):
        assert found.isfinite().all()
        assert (found - wanted).norm() <= loose * wanted.norm()
    assert (ours[3][3] == 0).all()
    assert (ours[4][V:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_alone_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Against fp64 of the same numbers; a sure reader's, an even one's, one with a label of
    probability 0, and an accuracy of a half."""
    hidden, weight = torch.randn(4, 16).to(dtype), (torch.randn(V, 16) * 0.5).to(dtype)
    hidden[0] *= 20
    hidden[1] = 0
    logits = hidden.double() @ weight.double().T
    top = logits.argmax(-1)
    labels = torch.stack((top[0], top.new_tensor(5), logits[2].argmin(), top[3]))
    exact = hidden.double().requires_grad_()
    rows = F.cross_entropy(exact @ weight.double().T, labels, reduction="none")
    (truth,) = torch.autograd.grad(rows.sum(), exact)
    eager = hidden.clone().requires_grad_()
    plain = F.cross_entropy((eager @ weight.T).float(), labels, reduction="none")
    (naive,) = torch.autograd.grad(plain.sum(), eager)
    inputs = {"hidden": hidden, "weight": weight, "labels": labels}
    ours = run("triton", inputs, ["hidden"], reduction="none")
    assert ours[2].tolist() == [1, 0, 0, 1]
    slack = 5e-7 * rows.detach().abs().clamp(min=1)
    assert ((ours[0] - rows).abs() <= (plain - rows).abs() + slack).all()
    error, allowed = (ours[3] / 0.7 - truth).norm(), (naive.double() - truth).norm()
    assert error <= allowed + {torch.float32: 1e-6}.get(dtype, 8e-3) * truth.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_shows_and_stays_alone(bad: float) -> None:
    hidden, weight = torch.randn(3, 8, device=DEVICE), torch.randn(300, 8, device=DEVICE)
    hidden[1, 3] = bad
    labels = torch.tensor([4, 5, 300], device=DEVICE)  # the last beyond the vocabulary
    with ops.backend("triton"):
        losses = ops.linear_cross_entropy_kd(hidden, labels, weight, reduction="none")
        empty = ops.linear_cross_entropy_kd(hidden[:0], labels[:0], weight)
    assert losses.cross_entropy.isnan().tolist() == [False, True, True]
    assert losses.correct[1:].tolist() == [0, 0]
    assert [x.item() for x in empty] == [0, 0, 0]
