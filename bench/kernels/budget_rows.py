"""The rows of the issue budget: an operation at a shape, its launches, its floor and its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.kernels.bench_distill import CHUNK_ROWS, HIDDEN, LOGITS
from bench.kernels.ceilings import Stage
from bench.kernels.launches import FP32_PRODUCT, Launch, Operation, recording

LARGE, PAPER = (2048, 65536), (8, 8192)
CODE = {"group_size": 32}
HEAD_TERMS = {
    "KL through the head": {"labels": False, "teacher": True},
    "cross-entropy through the head": {"labels": True, "teacher": False},
    "both losses through the head": {"labels": True, "teacher": True},
}


@dataclass(frozen=True, eq=False)
class Plan:
    """One operation at one shape.

    Attributes:
        title: what it is, and its shape.
        call: the launchers, on tensors without data; it may return how many of the first steps
            were made before, and do not count.
        elements: that its instructions are divided by; unit: what one is.
        work: what no implementation can leave out; least_launches: of it.
        target: of docs/kernels.md, in words.
        read_again: bytes that a kernel moves beyond its tensors once, by its name.
        quick: whether the test of the budget counts it.
    """

    title: str
    call: Callable[[list[Any]], int | None]
    elements: float
    unit: str
    work: Stage
    target: str = ""
    least_launches: int = 1
    read_again: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False

    def record(self) -> list[Launch | Operation]:
        with recording() as steps:
            skipped = self.call(steps) or 0
        return steps[skipped:]


def named(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


# --- K1 -------------------------------------------------------------------------------------------


def quantization_plans() -> Iterator[Plan]:
    from latentwire_fast import reference

    for bits in (4, 6, 8):
        code = {"bits": bits, **CODE}
        for shape in (LARGE, PAPER):
            values = shape[0] * shape[1]
            size = reference.code_bytes(shape[1], **code)
            packed = Stage(values * (2 + bits / 8 + 2 / 32))
            target = "0.85 of copy bandwidth" if shape == LARGE else "one launch"
            common = {"elements": values, "unit": "value", "target": target}

            def pack(steps: list[Any], shape: Any = shape, code: Any = code, size: Any = size):
                from latentwire_fast.kernels import quantization

                quantization.quantize_pack(cuda(*shape), **code, code_bytes=size)

            def unpack(steps: list[Any], shape: Any = shape, code: Any = code, size: Any = size):
                from latentwire_fast.kernels import quantization

                quantization.unpack_dequantize(
                    cuda(shape[0], size, dtype=torch.uint8),
                    cuda(shape[0], shape[1] // 32, dtype=torch.float16),
                    **code,
                    values=shape[1],
                    dtype=torch.bfloat16,
                )

            def fake(steps: list[Any], shape: Any = shape, code: Any = code):
                from latentwire_fast.kernels import quantization

                quantization.fake_quantize(cuda(*shape), **code)

            large = shape == LARGE
            what = f"{bits} bits, {named(shape)}"
            yield Plan(f"K1 pack, {what}", pack, work=packed, quick=large, **common)
            yield Plan(f"K1 unpack, {what}", unpack, work=packed, **common)
            if bits == 4:
                moved = Stage(4 * values)
                yield Plan(f"K1 fake-quantise, {what}", fake, work=moved, quick=large, **common)


def codes_plans() -> Iterator[Plan]:
    """The nearest codes of a batch of latents, for `vq` and `residual_vq`."""
    for rows, codes, width in ((65536, 512, 16), (65536, 512, 256)):

        def nearest(steps: list[Any], shape: tuple[int, int, int] = (rows, codes, width)):
            from latentwire_fast.kernels import codes as kernels

            rows, codes, width = shape
            kernels.nearest_codes(
                cuda(rows, width, dtype=torch.float32), cuda(codes, width, dtype=torch.float32)
            )

        yield Plan(
            *(f"K1 nearest codes, {rows} x {codes} x {width}", nearest),
            elements=rows * codes,
            unit="code of a row",
            work=Stage(4 * rows * width + 8 * rows),
        )


# --- K2 -------------------------------------------------------------------------------------------


def projection(
    steps: list[Any],
    shape: tuple[int, int, int],
    *,
    tanh: bool = False,
    groups: int = 1,
    group_rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    frozen: bool = True,
) -> tuple[Any, int]:
    """The kernels' arguments, and how many launches made what is kept while they are frozen."""
    from latentwire_fast.kernels import projection as kernels

    _, inner, width = shape
    weight, bias, gamma = cuda(width, inner, dtype=dtype), cuda(width, dtype=dtype), None
    gamma = cuda(width, dtype=dtype) if groups == 1 else None
    norm = kernels.Norm(cuda(inner, dtype=dtype), cuda(inner, dtype=dtype), 1e-5)
    folded = None
    if kernels.is_folded(inner, groups=groups, tanh=tanh):
        folded = kernels.fold(weight, bias, gamma, norm, dtype=dtype, frozen=frozen)
    gain = None if groups == 1 else cuda(groups, dtype=dtype)
    calibration = kernels.Calibration(gain, 0.02, 1e-8, group_rows, groups)
    arguments = kernels.Projection(weight, bias, gamma, norm, calibration, tanh, folded)
    return arguments, len(steps) if frozen else 0


def forward_call(shape: tuple[int, int, int], bits: int = 0, **options: Any) -> Any:
    """Rows of x, or a payload's codes, to calibrated outputs."""

    def call(steps: list[Any]) -> int:
        from latentwire_fast import reference
        from latentwire_fast.kernels import projection as kernels

        rows, inner, width = shape
        dtype = options.get("dtype", torch.bfloat16)
        arguments, skipped = projection(steps, shape, **options)
        beta = cuda(width, dtype=dtype) if options.get("groups", 1) == 1 else None
        source: Any = cuda(rows, inner, dtype=dtype)
        if bits:
            size = reference.code_bytes(32 * inner, bits=bits, group_size=32)
            source = kernels.Packed(
                cuda(rows // 32, size, dtype=torch.uint8),
                cuda(rows // 32, inner, dtype=torch.float16),
                *(bits, 32, 32, inner, dtype),
            )
        kernels.project_calibrate(source, arguments, beta)
        return skipped

    return call


def training_call(shape: tuple[int, int, int], **options: Any) -> Any:
    """Forward and backward of parameters that train: backward has what forward folded."""

    def call(steps: list[Any]) -> None:
        from latentwire_fast.kernels import projection as kernels
        from latentwire_fast.kernels import projection_backward

        rows, inner, width = shape
        x, grad = cuda(rows, inner), cuda(rows, width)
        arguments, _ = projection(steps, shape, frozen=False, **options)
        _, squares = kernels.project_calibrate(x, arguments, cuda(width))
        projection_backward.project_calibrate_backward(
            grad, x, squares, arguments, [True] * 7 + [False]
        )

    return call


def projection_plans() -> Iterator[Plan]:
    from bench.kernels.bench_projection import SHAPES, work

    for shape in SHAPES:
        large = shape[0] >= 16384
        target = "0.75 of copy bandwidth" if large else "1.2x torch.compile"
        common = {"elements": shape[0], "unit": "row", "least_launches": 2}
        forward = work(shape, 2, backward=False)
        what = named(shape)
        yield Plan(
            *(f"K2 forward, {what}", forward_call(shape)),
            **{**common, "target": target},
            work=forward,
            quick=shape[2] == 4096,
        )
        if shape[2] != 4096:
            continue
        packed = shape[0] * shape[1] * (0.5 + 2 / 32)
        traffic = forward.traffic - shape[0] * shape[1] * 2 + packed
        for bits in (4, 6, 8):
            yield Plan(
                *(f"K2 from {bits} bits, {what}", forward_call(shape, bits)),
                work=Stage(traffic, forward.flops),
                target="faster than K1 and K2 apart",
                quick=bits == 4,
                **common,
            )
        yield Plan(
            *(f"K2 tanh, forward, {what}", forward_call(shape, tanh=True)),
            work=forward,
            target="1.2x torch.compile",
            quick=large,
            **common,
        )
        exact = work(shape, 4, backward=False)
        yield Plan(
            *(f"K2 fp32, forward, {what}", forward_call(shape, dtype=torch.float32)),
            work=Stage(exact.traffic, exact.flops * FP32_PRODUCT),
            **common,
        )
        for tanh in (False, True):
            yield Plan(
                f"K2 {'tanh, ' if tanh else ''}forward and backward, {what}",
                training_call(shape, tanh=tanh),
                work=work(shape, 2, backward=True),
                target="1.5x eager",
                quick=large and not tanh,
                **common,
            )
    for rows in (32, 512):  # keys and values of 32 layers of 8 heads of 128 channels
        shape = (rows, 512, 65536)
        yield Plan(
            f"K2 deep prefix, 64 groups, {named(shape)}",
            forward_call(shape, groups=64, group_rows=32),
            work=work(shape, 2, backward=False),
            quick=rows == 512,
            **{"elements": rows, "unit": "row", "least_launches": 2},
        )


# --- K3 -------------------------------------------------------------------------------------------


def logits_call(shape: tuple[int, int], *, gradient: bool) -> Any:
    def call(steps: list[Any]) -> None:
        from latentwire_fast.kernels import distillation

        settings = {"tau": 1.0, "mask": cuda(shape[0], dtype=torch.bool)}
        if gradient:
            settings |= {"weight": cuda(dtype=torch.float32), "grad": cuda(*shape)}
        distillation.kd_kl(cuda(*shape), cuda(*shape), **settings)

    return call


def hidden_call(shape: tuple[int, int, int], *, labels: bool, teacher: bool) -> Any:
    """Losses through one frozen head, trained: the cross-entropy, the KL or both."""

    def call(steps: list[Any]) -> None:
        from latentwire_fast import reference
        from latentwire_fast.kernels import linear_losses

        rows, inner, vocabulary = shape
        source = reference.LossRows(
            cuda(rows, inner),
            cuda(rows, dtype=torch.int64) if labels else None,
            None,
            cuda(rows, inner) if teacher else None,
            cuda(rows, dtype=torch.bool) if teacher else None,
        )
        settings = reference.LossSettings(
            *(1.0, 1.0, 0.0, 0.0, vocabulary, CHUNK_ROWS, labels, teacher),
            *(True, False, False, None),
        )
        heads = reference.Heads(cuda(vocabulary, inner), None, None, None)
        factors = reference.row_factors(source)
        linear_losses.linear_losses(source, heads, settings, factors, unit=1.0)

    return call


def distillation_plans() -> Iterator[Plan]:
    for shape in LOGITS:
        pairs = shape[0] * shape[1]
        once = 2 * 2 * pairs
        first = shape == (4096, 128256)
        common = {"elements": pairs, "unit": "pair of logits"}
        yield Plan(
            *(f"K3a KL, forward, {named(shape)}", logits_call(shape, gradient=False)),
            work=Stage(once),
            quick=first,
            **common,
        )
        yield Plan(
            *(f"K3a KL, forward and backward, {named(shape)}", logits_call(shape, gradient=True)),
            work=Stage(3 * 2 * pairs),
            target="0.80 of the floor of two reads",
            read_again={"_kl_kernel": once},
            quick=first,
            **common,
        )
    for shape in HIDDEN:
        for what, terms in HEAD_TERMS.items():
            yield head_plan(shape, what, **terms)


def head_plan(shape: tuple[int, int, int], what: str, *, labels: bool, teacher: bool) -> Plan:
    """The products that no implementation can leave out: the logits of each model, and one back for
    each trained term."""
    rows, inner, vocabulary = shape
    products = 1 + teacher + labels + teacher
    flops = products * 2 * rows * inner * vocabulary
    # The gradient's walk over a chunk of fp32 logits: most of them have left L2.
    again = min(rows, CHUNK_ROWS) * vocabulary * 4 * (1 + teacher)
    return Plan(
        *(f"K3b {what}, {named(shape)}", hidden_call(shape, labels=labels, teacher=teacher)),
        elements=rows * vocabulary,
        unit="token of a row",
        work=Stage(2 * (products * rows + vocabulary) * inner, flops),
        target="0.65 of the matmul floor",
        read_again=dict.fromkeys(("_cross_entropy_kernel", "_kl_kernel"), again),
        quick=shape == HIDDEN[0],
    )


def plans() -> list[Plan]:
    return [*quantization_plans(), *codes_plans(), *projection_plans(), *distillation_plans()]
