"""`linear_cross_entropy_kd` against fp64 autograd of the plain formulas."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast import ops
from latentwire_fast.errors import ConfigError, KernelError
from latentwire_fast.ops.linear_losses import (
    WORKSPACE_BYTES,
    WORKSPACE_LEAST_BYTES,
    default_chunk_rows,
)

ROOT = Path(__file__).parents[2]
LABELS = torch.tensor([[1, 2, -100], [8, 0, 5]])
Tensors = dict[str, Tensor]


def tensors(*, separate: bool = False, rows: tuple[int, ...] = (2, 3), width: int = 4) -> Tensors:
    """fp64 hidden states, a head of 11 rows with a bias, and a teacher."""
    found = {
        "hidden": torch.randn(*rows, width),
        "weight": torch.randn(11, width),
        "bias": torch.randn(11),
        "teacher_hidden": torch.randn(*rows, 3 if separate else width),
    }
    if separate:
        found |= {"teacher_weight": torch.randn(13, 3), "teacher_bias": torch.randn(13)}
    return {name: x.double() for name, x in found.items()}


def plain(
    x: Tensors,
    labels: Tensor,
    *,
    vocabulary: int = 11,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    tau: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both losses and of what is correct, from whole logits."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = scale * (hidden @ weight.T + bias)[..., :vocabulary]
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    s = logits(x["hidden"], x["weight"], x["bias"])
    other = x.get("teacher_weight", x["weight"].detach())
    t = logits(x["teacher_hidden"], other, x.get("teacher_bias", x["bias"].detach()))
    cross_entropy = F.cross_entropy(
        s.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    log_q, log_p = (s / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    kd = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * tau**2
    return cross_entropy.view(labels.shape), kd, (s.argmax(-1) == labels).to(s.dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"softcap": 3.0, "scale": 0.5, "tau": 2.0},
        {"label_smoothing": 0.1, "vocabulary": 9, "tau": 0.5},
    ],
    ids=["plain", "capped", "smoothed"],
)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_values_and_gradients_in_fp64(
    settings: dict[str, Any], separate: bool, chunk_rows: int | None
) -> None:
    """Both losses with weights of their own, to hidden states, head and bias (F17, F21)."""
    x = tensors(separate=separate)
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    weights = torch.tensor([[1.0, 0.5, 1.0], [2.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = ops.linear_cross_entropy_kd(
        labels=LABELS,
        label_weights=weights,
        kd_weights=mask,
        chunk_rows=chunk_rows,
        **x,
        **settings,
    )
    rows, kd, correct = plain(x, LABELS, **settings)
    expected = (rows * weights).sum(), (kd * mask).sum()
    torch.testing.assert_close(found[:2], expected)
    counts = (LABELS >= 0) & (weights != 0)
    assert found.correct == (correct * counts).sum()
    for a, b in ((1.0, 0.0), (0.0, 1.0), (0.7, 1.3)):
        ours, wanted = (
            torch.autograd.grad(a * ce + b * kl, leaves, retain_graph=True)
            for ce, kl in (found[:2], expected)
        )
        torch.testing.assert_close(ours, wanted)
    mean = ops.linear_cross_entropy_kd(
        labels=LABELS, label_weights=weights, kd_weights=mask, reduction="mean", **x, **settings
    )
    torch.testing.assert_close(mean[:2], (expected[0] / 4, expected[1] / 5))


def test_gradcheck() -> None:
    x = tensors()
    hidden, weight, bias = (x.pop(name).requires_grad_() for name in ("hidden", "weight", "bias"))

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_cross_entropy_kd(
            hidden, LABELS, weight, bias=bias, **x, label_smoothing=0.2, softcap=2.0
        )[:2]

    # A shared head's gradient counts the teacher as given: the KL is checked with that one frozen.
    assert torch.autograd.gradcheck(lambda h, w, b: both(h, w, b)[0], (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: both(h, weight, bias), hidden)
    frozen = weight.detach()
    assert torch.autograd.gradcheck(
        lambda h: ops.linear_cross_entropy_kd(h, LABELS, frozen, **x, reduction="none")[:2], hidden
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [97, 5003])
def test_no_dtype_is_worse_than_eager(dtype: torch.dtype, vocabulary: int) -> None:
    hidden = torch.randn(7, 24).to(dtype).requires_grad_()
    weight, labels = (torch.randn(vocabulary, 24) * 0.3).to(dtype), torch.arange(7)
    exact = hidden.detach().double().requires_grad_()
    truth = F.cross_entropy(exact @ weight.double().T, labels, reduction="none")
    eager = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    ours = ops.linear_cross_entropy_kd(hidden, labels, weight, reduction="none").cross_entropy
    assert ((ours - truth).abs() <= (eager - truth).abs() + 1e-6 * truth).all()
    (wanted,) = torch.autograd.grad(truth.sum(), exact)
    errors = [
        (torch.autograd.grad(loss.sum(), hidden)[0] - wanted).norm() for loss in (ours, eager)
    ]
    assert errors[0] <= errors[1] + 1e-6 * wanted.norm()


def test_sure_readers_and_labels_of_no_probability() -> None:
    """Logits up to 1e4, a label at the top of its row, one at the bottom, tokens of -inf."""
    weight = torch.eye(6)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf])
    hidden = torch.tensor([[1e4, 0, 0, 0, 9, 9], [1e4, 0, 0, 0, 9, 9], [0.0, 0, 0, 0, 9, 9]])
    hidden.requires_grad_()
    losses = ops.linear_cross_entropy_kd(
        hidden, torch.tensor([0, 3, 1]), weight, bias=bias, reduction="none"
    )
    expected = torch.tensor([0.0, 1e4, math.log(4)])
    torch.testing.assert_close(losses.cross_entropy, expected)
    (grad,) = torch.autograd.grad(losses.cross_entropy.sum(), hidden)
    torch.testing.assert_close(grad[1], torch.tensor([1.0, 0, 0, -1, 0, 0]))
    torch.testing.assert_close(grad[2], torch.tensor([0.25, -0.75, 0.25, 0.25, 0, 0]))
    smooth = ops.linear_cross_entropy_kd(
        hidden[2:], torch.tensor([1]), weight, bias=bias, label_smoothing=0.5
    )
    torch.testing.assert_close(smooth.cross_entropy, expected[2])  # spread over the four there are


def test_nothing_to_score_is_zero() -> None:
    """No rows, no label, no weight: 0 with zero gradients, whatever the rows hold."""
    weight = torch.randn(9, 4)
    for rows, labels, weights in ((0, 0, None), (3, -1, None), (3, 2, torch.zeros(3))):
        hidden = torch.full((rows, 4), math.nan, requires_grad=True)
        losses = ops.linear_cross_entropy_kd(
            *(hidden, torch.full((rows,), labels), weight),
            **{"teacher_hidden": hidden.detach(), "label_weights": weights},
            **{"kd_weights": torch.zeros(rows, dtype=torch.bool), "reduction": "mean"},
        )
        (losses.cross_entropy + losses.kd).backward()
        assert [x.item() for x in losses] == [0, 0, 0]
        assert torch.equal(hidden.grad, torch.zeros(rows, 4))


def test_a_loss_that_is_only_to_be_known_has_no_gradient() -> None:
    x = {name: value.float() for name, value in tensors().items()}
    x["hidden"].requires_grad_()
    known = ops.linear_cross_entropy_kd(labels=LABELS, cross_entropy_gradient=False, **x)
    both = ops.linear_cross_entropy_kd(labels=LABELS, **x)
    assert not known.cross_entropy.requires_grad
    assert known.kd.requires_grad
    assert torch.equal(known.cross_entropy, both.cross_entropy)
    grads = [torch.autograd.grad(losses.kd, x["hidden"])[0] for losses in (known, both)]
    assert torch.equal(*grads)


def test_the_labels_loss_does_not_depend_on_the_teacher() -> None:
    x = {name: value.float() for name, value in tensors().items()}
    both = ops.linear_cross_entropy_kd(labels=LABELS, **x)
    alone = ops.linear_cross_entropy_kd(x["hidden"], LABELS, x["weight"], bias=x["bias"])
    assert torch.equal(both.cross_entropy, alone.cross_entropy)
    assert alone.kd == 0
    none = ops.linear_cross_entropy_kd(labels=None, **x)
    assert torch.equal(none.kd, both.kd)
    assert none.cross_entropy == 0


def test_F17_distillation_through_a_head_with_a_bias() -> None:
    """Without the bias the divergence is another one."""
    x = tensors()
    _, kd, _ = plain(x, LABELS)
    found = ops.linear_kd_kl(x["hidden"], x["teacher_hidden"], x["weight"], bias=x["bias"])
    torch.testing.assert_close(found, kd.mean())
    without = ops.linear_kd_kl(x["hidden"], x["teacher_hidden"], x["weight"])
    assert abs(without / found - 1) > 0.01


@pytest.mark.parametrize("separate", [False, True])
def test_F21_rows_beyond_the_vocabulary_do_not_count(separate: bool) -> None:
    """Whatever the head's padding holds, in student and teacher; it gets no gradient."""
    x = tensors(separate=separate)
    x["weight"].requires_grad_()
    losses = []
    for value in (0.0, 50.0):
        for name in ("weight", "bias", "teacher_weight", "teacher_bias"):
            if name in x:
                x[name].data[9:] = value
        found = ops.linear_cross_entropy_kd(labels=LABELS, vocabulary=9, **x)
        losses.append(found)
        (grad,) = torch.autograd.grad(found.cross_entropy + found.kd, x["weight"])
        assert (grad[9:] == 0).all()
        assert (grad[:9] != 0).any()
    torch.testing.assert_close(losses[0][:2], losses[1][:2], rtol=0, atol=0)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_F13_autocast_rounds_what_is_multiplied(hidden_dtype: torch.dtype) -> None:
    """An fp32 head under bf16 autocast gives what a bf16 head does; the losses stay fp32, and a
    small difference to the teacher exact."""
    hidden = torch.randn(5, 16).to(hidden_dtype)
    teacher = (hidden.float() + 1e-3 * torch.randn(5, 16)).to(hidden_dtype)
    weight, labels = torch.randn(99, 16, requires_grad=True), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_cross_entropy_kd(hidden, labels, weight, teacher_hidden=teacher)
    rounded = weight.detach().bfloat16()
    wanted = ops.linear_cross_entropy_kd(hidden.bfloat16(), labels, rounded)
    torch.testing.assert_close(found.cross_entropy, wanted.cross_entropy)
    assert found.cross_entropy.dtype == torch.float32
    exact = ops.linear_kd_kl(*(x.double() for x in (hidden, teacher, rounded)), reduction="sum")
    torch.testing.assert_close(found.kd.double(), exact, rtol=1e-2, atol=0)
    (grad,) = torch.autograd.grad(found.cross_entropy, weight)
    assert grad.dtype == torch.float32


# --- the chunk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 64, 512, 2400, 100_000])
@pytest.mark.parametrize("vocabulary", [50_257, 128_256, 262_144])
@pytest.mark.parametrize(("terms", "distils"), [(1, False), (1, True), (2, True)])
def test_F20_a_chunk_holds_a_quarter_of_the_logits_at_most(
    rows: int, vocabulary: int, terms: int, distils: bool
) -> None:
    chunk = default_chunk_rows(rows, vocabulary, terms=terms, distils=distils)
    held = 4 * chunk * vocabulary * (1 + distils + terms)  # bytes
    assert 1 <= chunk <= rows
    assert held <= max(rows * vocabulary, WORKSPACE_LEAST_BYTES)
    assert held <= WORKSPACE_BYTES
    assert chunk == rows or held > WORKSPACE_LEAST_BYTES / 3, "few rows at a time cost time"


PEAK = r"""
import re, sys
from pathlib import Path
import torch
from latentwire_fast import ops

rows, tokens = map(int, sys.argv[1:])
torch.manual_seed(0)
hidden, teacher = torch.randn(rows, 32, requires_grad=True), torch.randn(rows, 32)
weight, labels = torch.randn(tokens, 32), torch.arange(rows)

def run(hidden, teacher, weight, labels):
    losses = ops.linear_cross_entropy_kd(hidden, labels, weight, teacher_hidden=teacher)
    return losses.cross_entropy + losses.kd

def mib(field):
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

run(hidden[:2], teacher[:2], weight[:2000], labels[:2]).backward()  # sets up libraries
before = mib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run(hidden, teacher, weight, labels).backward()
print(mib("VmHWM") - before)
"""


@pytest.mark.slow
def test_F20_memory_of_the_default_chunk() -> None:
    """N = 256, V = 150,000, both losses, measured: at most a quarter of the logits' 146 MiB, and 8
    MiB of the allocator's."""
    command = [sys.executable, "-c", PEAK, "256", "150000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 256 * 150_000 * 4 / 2**20 / 4 + 8


# --- arguments ------------------------------------------------------------------------------------

X, HEAD = torch.zeros(2, 3, 8), torch.zeros(5, 8)
BAD_CALLS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "labels as floats": (KernelError, "labels is torch.float32", {"labels": torch.zeros(2, 3)}),
    "labels of another shape": (
        KernelError,
        r"labels has shape \(3,\); expected \(2, 3\)",
        {"labels": torch.zeros(3, dtype=torch.int64)},
    ),
    "bias of another shape": (
        KernelError,
        r"bias has shape \(6,\); expected \(5,\)",
        {"bias": torch.zeros(6)},
    ),
    "a teacher's bias alone": (
        KernelError,
        "teacher_bias without teacher_weight",
        {"teacher_hidden": X, "teacher_bias": torch.zeros(5)},
    ),
    "weights as integers": (
        KernelError,
        "label_weights is torch.int64",
        {"label_weights": torch.ones(2, 3, dtype=torch.int64)},
    ),
    "vocabulary beyond the head": (
        ConfigError,
        "vocabulary is 6; expected a number of tokens from 1 to the head's 5 rows",
        {"vocabulary": 6},
    ),
    "vocabulary of another type": (ConfigError, "vocabulary is True", {"vocabulary": True}),
    "scale": (ConfigError, "scale is 0; expected a positive number", {"scale": 0}),
    "smoothing": (ConfigError, r"label_smoothing is 1\.0; expected", {"label_smoothing": 1.0}),
    "tau": (ConfigError, "tau is -1", {"tau": -1}),
    "chunk": (ConfigError, "chunk_rows is 0", {"chunk_rows": 0}),
    "reduction": (ConfigError, "reduction is 'all'", {"reduction": "all"}),
    "a trained bias row by row": (
        ConfigError,
        "reduction 'none' cannot give the head's gradient",
        {"bias": torch.zeros(5, requires_grad=True), "reduction": "none"},
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_say_what_was_expected(name: str) -> None:
    error, message, arguments = BAD_CALLS[name]
    call: dict[str, Any] = {"labels": torch.zeros(2, 3, dtype=torch.int64), **arguments}
    with pytest.raises(error, match=f"linear_cross_entropy_kd: {message}"):
        ops.linear_cross_entropy_kd(X, weight=HEAD, **call)
