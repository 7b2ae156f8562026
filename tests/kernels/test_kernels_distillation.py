"""The distillation kernels against fp64 and the reference, on a GPU or interpreted."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE, INTERPRETED, assert_guards_hold, guard_outputs, needs_kernels
from latentwire_fast import ops, reference

logger = logging.getLogger(__name__)
# The interpreter computes lanes that a `where` then drops, and numpy warns of those.
pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KLS = (1e-7, 1e-5, 5e-5, 1e-3, 1e-1, 1.0, 5.0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Interpreted, a real vocabulary takes two seconds.
REAL = [(v, dtype) for v in (128_256, 152_064) for dtype in DTYPES]
REAL = [REAL[2], REAL[3]] if INTERPRETED else REAL
# What the gradient's error may be, as a share of its norm. fp32: a shift of 1.5 between the logits
# is kept to 6e-8, which their differences at KL 1e-7, 4e-4, notice. bf16: the interpreter cuts fp32
# off instead of rounding it, by up to 2^-7.
GRADIENT = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# What an error may exceed same-dtype eager's by.
EPSILON = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LOSS_SCALE = 4096.0  # as in mixed precision training: fp16 holds the small entries


def textbook_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Rows from the definition, in the dtype given."""
    log_p = (teacher / tau).log_softmax(-1)
    log_q = (student / tau).log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1) * tau**2


def with_gradient(rows: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """`rows(x)` and the gradient of its sum, both in fp64."""
    x = x.detach().clone().requires_grad_()
    losses = rows(x)
    (grad,) = torch.autograd.grad(losses.sum() * LOSS_SCALE, x)
    return losses.detach().double().cpu(), grad.double().cpu() / LOSS_SCALE


def triton_rows(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum) through the kernels."""
    teacher = teacher.to(DEVICE)
    with ops.backend("triton"):
        return with_gradient(
            lambda s: ops.kd_kl(s, teacher, tau=tau, reduction="none"), student.to(DEVICE)
        )


def exact_rows(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The same in fp64 from the definition, for the numbers as they are."""
    return with_gradient(lambda s: textbook_kl(s, teacher.double(), tau), student.double())


def share_of_norm(found: Tensor, truth: Tensor) -> Tensor:
    """Per row, the error's norm by the truth's."""
    return (found - truth).norm(dim=-1) / truth.norm(dim=-1)


def logits_over(kls: tuple[float, ...], vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    """(student, teacher), a row for each KL, from fp64 numbers rounded to `dtype`.

    At a small KL only some tokens differ, by steps that the dtype can hold.
    """
    kl = torch.tensor(kls)[:, None]
    spread = (2 * kl).sqrt().clamp(min=0.02)
    moved = torch.rand(len(kls), vocabulary) < 2 * kl / spread**2
    moved[:, 0] = True
    teacher = (torch.randn(len(kls), vocabulary) * 3).to(dtype)
    student = teacher.double() + moved * spread * torch.randn(len(kls), vocabulary)
    return [student.to(dtype), teacher]


@pytest.mark.parametrize(
    ("vocabulary", "tau"),
    [(1000, 0.5), (1000, 1.0), (1000, 2.0), (1000, 4.0), (5003, 2.0)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_over_its_range(vocabulary: int, tau: float, dtype: torch.dtype) -> None:
    """Within 5e-5 of fp64 on the same rounded logits, and no worse than eager in that dtype."""
    student, teacher = logits_over(KLS, vocabulary, dtype)
    losses, grad = triton_rows(student, teacher, tau)
    truth, exact = exact_rows(student, teacher, tau)
    assert truth.min() < 1e-5
    assert truth.max() > 0.1
    assert (losses > 0).all()
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=1e-12)
    eager, eager_grad = with_gradient(lambda s: textbook_kl(s, teacher, tau), student)
    assert ((losses - truth).abs() <= (eager - truth).abs() + EPSILON[dtype] * truth).all()
    error = share_of_norm(grad, exact)
    assert (error[1:] < GRADIENT[dtype]).all()
    assert error[0] < 2e-2  # KL 1e-7, where most of a gradient is denormal in fp16
    allowed = share_of_norm(eager_grad, exact).nan_to_num(nan=math.inf)  # eager fp16 overflows
    assert (error <= allowed + EPSILON[dtype]).all()


@pytest.mark.parametrize("kl", [1e-7, 1e-3])
def test_kl_of_logits_that_a_shift_separates(kl: float) -> None:
    """1.5 everywhere is no divergence; subtracting it must not cost what the rest has."""
    teacher = torch.randn(4, 5003) * 3
    student = teacher + torch.randn(4, 5003) * (2 * kl) ** 0.5 + 1.5
    losses, grad = triton_rows(student, teacher, 2.0)
    truth, exact = exact_rows(student, teacher, 2.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=1e-11)
    assert (share_of_norm(grad, exact) < GRADIENT[torch.float32]).all()


@pytest.mark.parametrize(("vocabulary", "dtype"), REAL)
def test_kl_at_a_real_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher = logits_over((5e-5, 1.0), vocabulary, dtype)
    losses, grad = triton_rows(student, teacher, 2.0)
    truth, exact = exact_rows(student, teacher, 2.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=0)
    assert (share_of_norm(grad, exact) < GRADIENT[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_the_same_logits_is_exactly_zero(dtype: torch.dtype) -> None:
    teacher = (torch.randn(3, 5003) * 10).to(dtype)
    teacher[1, 100:200] = -torch.inf
    losses, grad = triton_rows(teacher, teacher, 0.5)
    assert (losses == 0).all()
    assert (grad == 0).all()
    hidden, head = torch.randn(3, 16).to(dtype), torch.randn(2100, 16).to(dtype)
    source = hidden.to(DEVICE).requires_grad_()
    with ops.backend("triton"):
        loss = ops.linear_kd_kl(source, hidden.to(DEVICE), head.to(DEVICE))
        loss.backward()
    assert loss == 0
    assert source.grad is not None
    assert (source.grad == 0).all()


def test_an_atypical_first_tile_costs_no_accuracy() -> None:
    """The centre comes from the first tile: there all differences are 7, elsewhere small."""
    teacher = torch.randn(3, 5003)
    teacher[:, :2048] -= 30
    student = teacher + torch.randn(3, 5003) * 4e-3
    student[:, :2048] += 7
    student[1, :2048] = -torch.inf
    teacher[2, :2048] = -torch.inf
    losses, _ = triton_rows(student, teacher, 1.0)
    truth, _ = exact_rows(student, teacher, 1.0)
    truth[1] = textbook_kl(student[1, 2048:].double(), teacher[1, 2048:].double(), 1.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=1e-11)


@pytest.mark.parametrize(("tau", "gap"), [(1.0, 80), (1.0, 110), (0.5, 55), (0.5, 200), (0.25, 27)])
def test_a_teacher_that_rises_late_keeps_what_the_student_had_before(
    tau: float, gap: float
) -> None:
    """The first tile's top token is the student's; relative to the teacher's last it underflows."""
    teacher = torch.randn(2, 5003) - 10
    student = teacher.clone()
    teacher[:, 5] = student[:, 5] = 5.0
    teacher[0, 3000], student[0, 3000] = 5.0 + gap, -3.0
    # In steps, none of which underflows by itself; the student falls as slowly.
    steps = torch.tensor([2100, 4200])
    teacher[1, steps] = 5.0 + gap * torch.tensor([0.6, 1.2])
    student[1, steps] = torch.tensor([-1.0, -3.0])
    losses, grad = triton_rows(student, teacher, tau)
    truth, exact = exact_rows(student, teacher, tau)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=0)
    assert (share_of_norm(grad, exact) < GRADIENT[torch.float32]).all()


def test_logits_of_any_spread() -> None:
    teacher = torch.randn(8, 5003) * 1000
    student = teacher + torch.randn(8, 5003) * 200
    losses, grad = triton_rows(student, teacher, 1.0)
    truth, exact = exact_rows(student, teacher, 1.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=1e-6)
    assert ((grad - exact).norm(dim=-1) <= 1e-3 * exact.norm(dim=-1) + 1e-6).all()


@pytest.mark.parametrize("place", [3, 2047, 2048, 5000])
def test_one_token_holds_nearly_all_of_the_teacher(place: int) -> None:
    """p = 0.999, wherever in the row: the mean of Delta is that token's, the KL the others'."""
    teacher = torch.randn(2, 5003)
    teacher[:, place] = 16.0
    student = teacher + torch.randn(2, 5003) * torch.tensor([[1e-2], [1.0]])
    student[:, place] += torch.tensor([0.5, -3.0])
    losses, grad = triton_rows(student, teacher, 1.0)
    truth, exact = exact_rows(student, teacher, 1.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=0)
    assert (share_of_norm(grad, exact) < GRADIENT[torch.float32]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gap", "rarer"), [(0.5, 0), (20, 15), (40, 0), (40, 35), (100, 60)])
def test_threads_that_see_other_shifts(gap: float, rarer: float, dtype: torch.dtype) -> None:
    """Each second thread's tokens are shifted by `gap`, and e^rarer times less probable."""
    other = (torch.arange(5000) // 8) % 2 == 1
    teacher = (torch.randn(2, 5000) - rarer * other).to(dtype)
    student = teacher.double() + torch.randn(2, 5000) * torch.tensor([[0.1], [1.0]]) + gap * other
    student = student.to(dtype)
    losses, grad = triton_rows(student, teacher, 1.0)
    truth, exact = exact_rows(student, teacher, 1.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=0)
    assert (share_of_norm(grad, exact) < GRADIENT[dtype]).all()


def test_infinite_and_distant_logits() -> None:
    student, teacher = torch.randn(5, 300), torch.randn(5, 300) * 3
    teacher[0, :7] = -torch.inf
    student[1, 250:] = -torch.inf
    student[2, 250:] = teacher[2, 250:] = -torch.inf
    student[3, 0], teacher[3, 1] = 500.0, 500.0
    teacher[4] = student[4]
    losses, grad = triton_rows(student, teacher, 1.5)
    with ops.backend("reference"):
        expected, expected_grad = with_gradient(
            lambda s: ops.kd_kl(s, teacher, tau=1.5, reduction="none"), student
        )
    torch.testing.assert_close(losses, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("bad", "softcap"), [(math.nan, None), (math.nan, 3.0), (math.inf, None)])
def test_a_broken_row_shows_and_stays_alone(bad: float, softcap: float | None) -> None:
    """NaN must not be lost in a minimum or maximum, not even where the teacher has p = 0."""
    student, teacher = torch.randn(4, 300), torch.randn(4, 300)
    student[0, 5] = teacher[1, 6] = student[2, 7] = bad
    teacher[2, 7] = -torch.inf
    losses, grad = triton_rows(student, teacher, 1.0)
    assert losses.isnan().tolist() == [True, True, True, False]
    assert grad.isnan().any(-1).tolist() == [True, True, True, False]
    hidden, head = torch.randn(3, 8), torch.randn(300, 8)
    hidden[1, 3] = bad
    with ops.backend("triton"):
        rows = ops.linear_kd_kl(
            hidden.to(DEVICE),
            torch.randn(3, 8, device=DEVICE),
            head.to(DEVICE),
            reduction="none",
            softcap=softcap,
        )
    assert rows.isnan().tolist() == [False, True, False]


def test_strided_logits_and_masked_rows() -> None:
    """Slices of a larger buffer that holds NaN; a masked row full of it."""
    wide = torch.full((2, 2, 3, 90), math.nan)
    student, teacher = wide[0, :, 1:, :77], wide[1, :, :2, 5:82]
    student.copy_(torch.randn(2, 2, 77))
    teacher.copy_(torch.randn(2, 2, 77))
    student[0, 1] = math.nan
    mask = torch.tensor([[True, False], [True, True]])
    grads = []
    for name, device in (("triton", DEVICE), ("reference", "cpu")):
        leaf = student.detach().clone().to(device).requires_grad_()
        with ops.backend(name):
            loss = ops.kd_kl(leaf, teacher.to(device), tau=2.0, mask=mask.to(device))
            loss.backward()
        assert leaf.grad is not None
        grads.append((loss.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-8)
    assert (grads[0][1][0, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.0, 300.0])
def test_the_gradient_in_place_is_the_same(dtype: torch.dtype, factor: float) -> None:
    """Whatever comes in from above; the logits become it, and a kept graph gives it again."""
    student, teacher = torch.randn(3, 2100).to(dtype), torch.randn(3, 2100).to(dtype)
    mask = torch.tensor([[True, False], [False, False], [True, False]])[:, 0]  # strided
    grads = []
    for in_place in (False, True):
        leaf = student.clone().to(DEVICE).requires_grad_()
        logits = leaf.clone()
        with ops.backend("triton"):
            loss = factor * ops.kd_kl(
                logits, teacher.to(DEVICE), tau=2.0, mask=mask.to(DEVICE), in_place=in_place
            )
            grads += torch.autograd.grad(loss, leaf, retain_graph=True)
            assert torch.equal(logits, leaf) is not in_place
            grads += torch.autograd.grad(loss, leaf)
    assert (grads[0][1] == 0).all()
    assert (grads[0] != 0).any() == (factor != 0)
    for other in grads[1:]:
        assert torch.equal(other, grads[0])


def linear_pair(
    backend: str, inputs: dict[str, Tensor], leaves: list[str], **settings: Any
) -> list[Tensor]:
    """Loss and gradients of `leaves`, on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    inputs = {name: x.detach().clone().to(device) for name, x in inputs.items()}
    sources = [inputs[name].requires_grad_() for name in leaves]
    with ops.backend(backend):
        loss = ops.linear_kd_kl(**inputs, **settings)
        grads = torch.autograd.grad(loss.sum() * LOSS_SCALE, sources)
    return [x.detach().cpu().float() for x in (loss, *grads)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_kl_equals_the_reference(
    softcap: float | None, separate: bool, reduction: Any, dtype: torch.dtype
) -> None:
    """Shared and separate heads (the teacher's larger), chunks, a masked row of NaN, gradients."""
    rows, width, vocabulary = 7, 16, 2100
    student = torch.randn(rows, width)
    inputs = {
        "student_hidden": student,
        "teacher_hidden": student + 0.01 * torch.randn(rows, width),
        "weight": torch.randn(vocabulary, width) * width**-0.5,
    }
    if separate:
        inputs["teacher_hidden"] = torch.randn(rows, 12)
        inputs["teacher_weight"] = torch.randn(vocabulary + 9, 12) * 0.3
    student[4] = math.nan
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["mask"] = torch.arange(rows) != 4
    leaves = ["student_hidden", "weight"] if reduction == "mean" else ["student_hidden"]
    settings = {"tau": 2.0, "chunk_rows": 3, "reduction": reduction, "softcap": softcap}
    ours = linear_pair("triton", inputs, leaves, **settings)
    expected = linear_pair("reference", inputs, leaves, **settings)
    torch.testing.assert_close(ours[0], expected[0], rtol=5e-5, atol=0)
    # Both end in the inputs' dtype; the kernel's q - p is in it before the matmul, too.
    loose = 1e-4 if dtype == torch.float32 else 2e-3
    for found, wanted in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=loose, atol=loose * 0.1 * wanted.abs().max())
    assert (ours[1][4] == 0).all()


def hidden_over(
    kls: tuple[float, ...], width: int, vocabulary: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Hidden states, a row for about each KL, and a head."""
    kl = torch.tensor(kls)[:, None]
    teacher = (torch.randn(len(kls), width) * 3).to(dtype)
    return {
        "student_hidden": (teacher.float() + torch.randn(len(kls), width) * (2 * kl).sqrt()).to(
            dtype
        ),
        "teacher_hidden": teacher,
        "weight": (torch.randn(vocabulary, width) * width**-0.5).to(dtype),
    }


def exact_linear(
    inputs: dict[str, Tensor], tau: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """fp64 of the same numbers: losses, and the gradient of their sum."""
    wide = {name: x.double() for name, x in inputs.items()}
    vocabulary = len(wide["weight"])
    other = wide.get("teacher_weight", wide["weight"])[:vocabulary]

    def capped(logits: Tensor) -> Tensor:
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    t = capped(wide["teacher_hidden"] @ other.T)
    return with_gradient(
        lambda h: textbook_kl(capped(h @ wide["weight"].T), t, tau), wide["student_hidden"]
    )


def triton_linear(inputs: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """The same through the kernels."""
    student, *_ = moved = {name: x.to(DEVICE) for name, x in inputs.items()}
    others = {name: x for name, x in moved.items() if name != student}
    with ops.backend("triton"):
        return with_gradient(
            lambda h: ops.linear_kd_kl(h, **others, reduction="none", **settings), moved[student]
        )


OTHER_HEADS = ["two", "the teacher's larger"]


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize(
    ("dtype", "heads"),
    [*((dtype, "one") for dtype in DTYPES), *((torch.bfloat16, heads) for heads in OTHER_HEADS)],
)
def test_linear_kl_over_its_range(dtype: torch.dtype, heads: str, softcap: float | None) -> None:
    """The loss within 5e-5 of fp64 on the same numbers, also without a gradient, and the gradient
    within 2 %; in half precision too."""
    inputs = hidden_over((2e-6, 1e-5, 5e-5, 1e-3, 1e-1, 1.0, 12.0), 64, 2100, dtype)
    if heads != "one":
        more = torch.randn(7 if heads == "the teacher's larger" else 0, 64).to(dtype)
        inputs["teacher_weight"] = torch.cat((inputs["weight"], more))
    truth, exact = exact_linear(inputs, 1.0, softcap)
    losses, grad = triton_linear(inputs, softcap=softcap, chunk_rows=4)
    with torch.no_grad(), ops.backend("triton"):
        moved = {name: x.to(DEVICE) for name, x in inputs.items()}
        plain = ops.linear_kd_kl(**moved, softcap=softcap, chunk_rows=4, reduction="none")
    assert truth.min() < 2e-5
    assert truth.max() > 2
    assert torch.equal(plain.cpu().double(), losses)
    error = ((losses - truth) / truth).abs()
    gradient = share_of_norm(grad, exact)
    figures = [" ".join(f"{x:.0e}" for x in row) for row in (truth, error, gradient)]
    logger.info("KL %s; loss off by %s; gradient by %s", *figures)
    # Two matmuls round each logit for itself; what they differ by is that much off.
    assert (error[truth > (0 if heads == "one" else 5e-4)] <= 5e-5).all()
    assert (error <= 1e-3).all()
    assert (gradient <= 0.02).all()


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32], ids=str)
def test_linear_kl_of_mixed_dtypes_rounds_nothing(hidden_dtype: torch.dtype) -> None:
    inputs = hidden_over((1e-5, 1e-2, 1.0), 64, 2100, hidden_dtype)
    inputs["weight"] = inputs["weight"].bfloat16()
    truth, exact = exact_linear(inputs, 2.0)
    losses, grad = triton_linear(inputs, tau=2.0)
    torch.testing.assert_close(losses, truth, rtol=5e-5, atol=0)
    assert (share_of_norm(grad, exact) <= 1e-3).all()


@pytest.mark.parametrize("kl", [5e-5, 5e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_kl_where_plain_logits_lose_its_gradient(dtype: torch.dtype, kl: float) -> None:
    """Half precision hidden states and head: within 2 % of fp64 on the same numbers.

    Through logits in that dtype, as a model's `lm_head` gives them, it is off by about its size.
    """
    inputs = hidden_over((kl,) * 8, 128, 5003, dtype)
    truth, exact = exact_linear(inputs, 1.0)
    losses, ours = triton_linear(inputs)
    teacher, head = inputs["teacher_hidden"], inputs["weight"]
    naive_losses, naive = with_gradient(
        lambda h: textbook_kl((h @ head.T).float(), (teacher @ head.T).float(), 1.0),
        inputs["student_hidden"],
    )
    error, naive_error = ((g - exact).norm() / exact.norm() for g in (ours, naive))
    loss, naive_loss = (((x - truth) / truth).abs().max() for x in (losses, naive_losses))
    logger.info(
        "%s, KL %.1e: gradient off by %.2g, through plain logits %.2g; loss by %.2g, %.2g",
        *(dtype, truth.mean(), error, naive_error, loss, naive_loss),
    )
    assert loss <= 5e-5
    assert loss <= naive_loss
    assert error < 0.02
    assert error <= naive_error + EPSILON[dtype]
    if dtype == torch.bfloat16:
        assert naive_error > (0.5 if kl == 5e-5 else 0.05)


def test_no_rows_and_no_rows_that_count() -> None:
    weight = torch.randn(9, 4, device=DEVICE)
    for rows in (0, 3):
        hidden = torch.randn(rows, 4, device=DEVICE, requires_grad=True)
        mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
        teacher = torch.randn(rows, 4, device=DEVICE)
        with ops.backend("triton"):
            for loss in (
                ops.linear_kd_kl(hidden, teacher, weight, mask=mask),
                ops.kd_kl(hidden, teacher, mask=mask),
                ops.kd_kl(hidden * 1, teacher, mask=mask, in_place=True),
            ):
                (grad,) = torch.autograd.grad(loss, hidden)
                assert loss == 0
                assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_is_written_outside_or_read_unwritten(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer is cut out of a poisoned one: the results are the same and the rims whole."""
    from latentwire_fast.kernels import distillation, linear_losses

    shapes = ((3, 2101), (3, 2101), (2, 5, 8), (2101, 8))
    student, teacher, hidden, head = (torch.randn(s).to(DEVICE, dtype) for s in shapes)
    labels, bias = torch.arange(5, device=DEVICE), torch.randn(2101, device=DEVICE)
    one, factors = torch.ones((), device=DEVICE), torch.tensor([0.0, 1.0, 2.0], device=DEVICE)

    def results() -> list[Tensor]:
        grad = student.new_empty((3, 2101), dtype=dtype)
        losses = distillation.kd_kl(student, teacher, tau=1.0, weight=one, grad=grad)
        distillation.scale_rows(grad, factors)
        settings = reference.LossSettings(
            *(1.0, 1.0, 0.0, 0.1, 2101, 2), *(True, True, True, True, True, None)
        )
        rows = reference.LossRows(hidden[0], labels, None, hidden[1], None)
        heads = reference.Heads(head, bias, None, None)
        linear = linear_losses.linear_losses(
            *(rows, heads, settings, reference.row_factors(rows)), unit=1.0
        )
        return [grad, losses, *linear]

    expected = results()
    with monkeypatch.context() as patch:
        buffers = guard_outputs(patch)
        found = results()
    # Gradient and losses; six results, logits, a term's gradient and in half precision the other's.
    assert len(buffers) == (10 if dtype == torch.float32 else 11)
    assert_guards_hold(buffers)
    assert (found[0][0] == 0).all()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


def rows_far_apart(rows: int, stride: int, width: int) -> Tensor:
    """fp16 `[rows, width]`, `stride` numbers apart, in memory that takes no space in between."""
    size = 2 * ((rows - 1) * stride + width)
    no_reserve = 0x4000  # MAP_NORESERVE, which Python 3.11's mmap does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float16)
    return memory.as_strided((rows, width), (stride, 1))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the next test")
def test_offsets_beyond_32_bits_interpreted() -> None:
    """A row number of 32 bits times this stride would wrap round."""
    from latentwire_fast.kernels import distillation

    student, teacher = (rows_far_apart(3, 2**30 + 16, 500) for _ in range(2))
    student.copy_(torch.randn(3, 500))
    teacher.copy_(torch.randn(3, 500))
    expected = student.clone()
    settings = {"tau": 2.0, "weight": torch.ones(())}
    wanted = distillation.kd_kl(expected, teacher.clone(), grad=expected, **settings)
    losses = distillation.kd_kl(student, teacher, grad=student, **settings)
    assert torch.equal(losses, wanted)
    assert torch.equal(student, expected)
    distillation.scale_rows(student, torch.tensor(2.0))
    assert torch.equal(student, expected * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [128_256, 152_064])
def test_more_logits_than_32_bits_count(vocabulary: int) -> None:
    rows = 2**31 // vocabulary + 2
    teacher = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    student = torch.randn_like(teacher).requires_grad_()
    losses = ops.kd_kl(student * 1, teacher, tau=2.0, reduction="none", in_place=True)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    with ops.backend("reference"):
        last = student.detach()[-2:].requires_grad_()
        expected = ops.kd_kl(last, teacher[-2:], tau=2.0, reduction="none")
        (expected_grad,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(losses[-2:], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[-2:], expected_grad, rtol=1e-2, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [128_256, 152_064])
def test_linear_kl_at_real_shapes(vocabulary: int) -> None:
    """bf16, the shapes of an 8B model's head, against fp64."""
    head = torch.randn(vocabulary, 4096, device="cuda", dtype=torch.bfloat16) * 4096**-0.5
    teacher = torch.randn(600, 4096, device="cuda", dtype=torch.bfloat16) * 3
    student = teacher + 0.05 * torch.randn_like(teacher)
    inputs = {"student_hidden": student, "teacher_hidden": teacher, "weight": head}
    truth, exact = exact_linear(inputs, 2.0)
    student.requires_grad_()
    loss = ops.linear_kd_kl(student, teacher, head, tau=2.0, chunk_rows=256)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss.detach().cpu().double(), truth.mean(), rtol=5e-5, atol=0)
    assert ((grad.cpu() * 600 - exact).norm() / exact.norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu() -> None:
    """Forward and backward without a host synchronisation; the first call compiles."""
    logits = torch.randn(2, 4, 999, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(2, 4, 64, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(999, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.tensor([True, False, True, True], device="cuda")

    def step() -> None:
        student = logits[0].detach().requires_grad_()
        for options in ({"mask": mask}, {"mask": mask, "in_place": True}, {"reduction": "sum"}):
            (0.5 * ops.kd_kl(student * 1, logits[1], tau=2.0, **options)).backward()
        source = hidden[0].detach().requires_grad_()
        for other in (None, head.detach()):
            loss = ops.linear_kd_kl(source, hidden[1], head, teacher_weight=other, mask=mask)
            (0.5 * loss).backward()

    step()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")  # sets it, and then warns
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
