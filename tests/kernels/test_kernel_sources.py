"""What no result shows without a GPU: no launcher waits for it, and offsets are 64 bits wide.

Source checks, and calls on tensors without data: whoever asks one for a number gets an exception.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from latentwire_fast import ops, reference
from latentwire_fast.ops.dispatch import autocast_dtype
from latentwire_fast.ops.linear_losses import _linear_losses

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(
    [*(ROOT / "kernels").glob("*.py"), *(ROOT / "latentwire_fast" / "ops").glob("*.py")]
)
KERNELS = [
    ROOT / "kernels" / f"{name}.py"
    for name in (
        *("codes", "cross_entropy", "distillation", "quantization"),
        *("projection", "projection_rows", "projection_halves", "projection_gradients"),
    )
]
WAITING = {
    "item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "masked_select", "unique",
    "synchronize", "equal", "allclose",
}  # fmt: skip
# Encoding has to know whether codes can carry the latent before it lets the payload go.
ALLOWED = {
    ("quantization.py", "scales.amax().item"),
    ("quantization.py", "z.float().abs().amax().item"),
}


def calls(path: Path) -> Iterator[ast.Call]:
    yield from (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_reads_a_number_from_the_gpu(path: Path) -> None:
    for call in calls(path):
        name = ast.unparse(call.func)
        if (path.name, name) in ALLOWED:
            continue
        assert name != "bool", f"{path.name}:{call.lineno}: bool() of a tensor waits"
        assert name.split(".")[-1] not in WAITING, f"{path.name}:{call.lineno}: {name}() waits"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_program_numbers_are_64_bits_before_anything_multiplies_them(path: Path) -> None:
    """2^31 numbers are 16k rows of 128k logits: an offset needs 64 bits."""
    source = path.read_text()
    assert "tl.program_id(" in source
    wide = [ast.unparse(call) for call in calls(path) if "tl.int64" in ast.unparse(call)]
    assert source.count("tl.program_id(") == wide.count("tl.program_id(0).to(tl.int64)")


# --- tensors without data -------------------------------------------------------------------------


class Launches:
    """Stands in for a Triton kernel: counts its launches."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.count += 1

        return launch


@pytest.fixture
def without_data() -> Iterator[None]:
    with FakeTensorMode():
        yield


def test_a_tensor_without_data_notices_a_host_read(without_data: None) -> None:
    """The instrument of the tests below."""
    with pytest.raises(DataDependentOutputException):
        torch.ones(()).item()
    with pytest.raises(DataDependentOutputException):
        bool(torch.ones(()) == 1.0)


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autograd_reads_nothing(without_data: None, reduction: Any, dtype: torch.dtype) -> None:
    """Forward and backward, the incoming gradient a 0-dim tensor on the device."""
    leaf = torch.empty(4, 9, dtype=dtype, requires_grad=True)
    head = torch.empty(9, 9, dtype=dtype, requires_grad=reduction != "none")
    other, mask = torch.empty(4, 9, dtype=dtype), torch.empty(4, dtype=torch.bool)
    results: list[Tensor] = []
    for where in (None, mask):
        settings: dict[str, Any] = {"tau": 2.0, "mask": where, "reduction": reduction}
        results.append(ops.kd_kl(leaf, other, **settings))
        results.append(ops.kd_kl(leaf * 1, other, in_place=True, **settings))
        results.append(ops.linear_kd_kl(leaf, other, head, **settings))
        results.append(
            ops.linear_kd_kl(leaf, other, head, teacher_weight=head.detach(), **settings)
        )
        losses = ops.linear_cross_entropy_kd(
            *(leaf, torch.empty(4, dtype=torch.int64), head),
            **{"teacher_hidden": other, "kd_weights": where, "reduction": reduction},
        )
        results.append(losses.cross_entropy + losses.kd)  # one graph
    results.append(ops.fake_quantize(leaf, bits=4, group_size=16))
    for calibration in ops.CALIBRATIONS:
        results.append(ops.project_calibrate(leaf, head, target_rms=1.0, calibration=calibration))
    for result in results:
        (result.sum() * torch.empty(())).backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape


def test_launchers_read_nothing(without_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from latentwire_fast.kernels import cross_entropy, distillation, linear_losses, quantization

    kernels = {}
    for module in (cross_entropy, distillation, quantization):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels[name] = Launches()
            monkeypatch.setattr(module, name, kernels[name])
    student, teacher, weight = torch.empty(5, 9), torch.empty(5, 9), torch.empty(())
    mask = torch.empty(5, dtype=torch.bool)
    grad = torch.empty(5, 9)
    distillation.kd_kl(student, teacher, tau=2.0, mask=mask, weight=weight, grad=grad)
    distillation.scale_rows(grad, weight)
    head = torch.empty(9, 9)
    settings = reference.LossSettings(
        *(2.0, 0.5, 0.0, 0.1, 9, 2),
        **dict.fromkeys(("label_gradient", "kd_gradient"), True),
        **dict.fromkeys(("needs_hidden", "needs_weight", "needs_bias"), True),
        dtype=None,
    )
    labels, bias = torch.empty(5, dtype=torch.int64), torch.empty(9)
    for teacher_head in (None, torch.empty(11, 9)):
        rows = reference.LossRows(student, labels, mask, teacher, mask)
        heads = reference.Heads(head, bias, teacher_head, None)
        factors = reference.row_factors(rows)
        linear_losses.linear_losses(rows, heads, settings, factors, unit=1.0)
    codes, scales = quantization.quantize_pack(student, bits=4, group_size=16, code_bytes=5)
    quantization.unpack_dequantize(
        codes, scales, bits=4, group_size=16, values=9, dtype=torch.float32
    )
    quantization.fake_quantize(student, bits=4, group_size=16)
    assert {name: k.count for name, k in kernels.items()} == {
        "_cross_entropy_kernel": 3 + 3,
        "_kl_kernel": 1 + 3 + 3,
        "_scale_rows_kernel": 1,
        "_quantize_pack_kernel": 1,
        "_unpack_dequantize_kernel": 1,
        "_fake_quantize_kernel": 1,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_product_on_a_gpu_is_fp32_and_goes_where_it_should(
    without_data: None, dtype: torch.dtype
) -> None:
    """The call that no CPU makes: half precision factors, an fp32 result."""
    pytest.importorskip("triton")
    from latentwire_fast.kernels.matmul import matmul_fp32

    a, b = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((4, 16), (16, 8)))
    assert matmul_fp32(a, b).dtype == torch.float32
    out = torch.empty(4, 8, device="cuda")
    assert matmul_fp32(a, b, out=out) is out


@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float32], ids=str)
def test_F13_under_autocast_the_head_is_multiplied_in_its_dtype(
    without_data: None, hidden: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of fp32 heads, and of the fp32 hidden states that a final norm leaves; both products
    and the one back."""
    pytest.importorskip("triton")
    from latentwire_fast.kernels import cross_entropy, distillation, linear_losses

    monkeypatch.setattr(distillation, "_kl_kernel", Launches())
    monkeypatch.setattr(cross_entropy, "_cross_entropy_kernel", Launches())
    factors: list[torch.dtype] = []
    multiply = linear_losses.matmul_fp32

    def watched(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        factors.extend((a.dtype, b.dtype))
        return multiply(a, b, **options)

    monkeypatch.setattr(linear_losses, "matmul_fp32", watched)
    monkeypatch.setattr("latentwire_fast.ops.linear_losses.uses_triton", lambda *_, **__: True)
    student, teacher = torch.empty(4, 8, dtype=hidden), torch.empty(4, 8)
    labels, head = torch.empty(4, dtype=torch.int64), torch.empty(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = autocast_dtype(student)
    settings = reference.LossSettings(
        *(1.0, 1.0, 0.0, 0.0, 16, 4), *(True, True, True, False, False, dtype)
    )
    _linear_losses(student, labels, None, teacher, None, *(head, None, None, None), *settings)
    assert factors == [torch.bfloat16] * 6


class Computed(TorchDispatchMode):
    """Names of the torch ops that compute something: not those that make or view a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        name = op.overloadpacket.__name__
        if not op.is_view and name not in ("empty", "new_empty", "detach"):
            self.names.append(name)
        return op(*arguments, **(options or {}))


# (calibration's rows, tanh, groups of outputs): the kernels that are launched, the ops round them.
PROJECTIONS: dict[str, tuple[int, bool, int, dict[str, int], list[str]]] = {
    "token": (1, False, 1, {"_rows_kernel": 1}, ["addmm"]),
    "example": (32, False, 1, {"_rows_kernel": 1}, ["addmm"]),
    "none": (0, False, 1, {"_rows_kernel": 1}, ["addmm"]),
    "batch": (128, False, 1, {"_rows_kernel": 2}, ["mean", "addmm"]),
    "tanh": (1, True, 1, {"_rows_kernel": 1, "_tiles_kernel": 2}, []),
    "groups": (1, False, 3, {"_rows_kernel": 1, "_tiles_kernel": 2}, []),
    "groups, example": (32, False, 3, {"_rows_kernel": 1, "_tiles_kernel": 2}, []),
    "groups, none": (0, False, 3, {"_rows_kernel": 1, "_tiles_kernel": 1}, []),
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_frozen_projection_is_two_launches(
    name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel and one matmul, from a payload's codes too; the others as documented."""
    pytest.importorskip("triton")
    from latentwire_fast.kernels import projection, projection_rows, projection_tiles

    rows, tanh, groups, kernels, computed = PROJECTIONS[name]
    modules = {
        "_fold_kernel": projection,
        "_rows_kernel": projection_rows,
        "_tiles_kernel": projection_tiles,
    }
    launches = {kernel: Launches() for kernel in modules}
    for kernel, module in modules.items():
        monkeypatch.setattr(module, kernel, launches[kernel])
    weight, vector = torch.randn(24, 16), torch.randn(24)
    arguments = projection.Projection(
        *(weight, vector, vector),
        norm=projection.Norm(torch.ones(16), torch.zeros(16), 1e-5),
        calibration=projection.Calibration(None, 1.0, 1e-8, rows, groups),
        tanh=tanh,
        folded=projection.fold(weight, vector, vector, dtype=torch.float32)
        if projection.is_folded(16, groups=groups, tanh=tanh)
        else None,
    )
    codes, scales = torch.empty(4, 256, dtype=torch.uint8), torch.empty(4, 16).half()
    source = projection.Packed(codes, scales, 4, 32, 32, 16, torch.float32)
    launches["_fold_kernel"].count = 0
    with Computed() as seen:
        projection.project_calibrate(source if packed else torch.empty(128, 16), arguments, vector)
    assert {kernel: run.count for kernel, run in launches.items() if run.count} == kernels
    assert seen.names == computed
