"""The launches of a call, recorded on tensors without data and compiled for sm_90: no GPU needed.

A launcher of `kernels/` runs as it is, on fake CUDA tensors. Its Triton kernels are noted down with
their arguments in place of being started, and so is every torch operation between them.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.kernels.ceilings import Stage

KERNELS = Path(__file__).parents[2] / "kernels"
DTYPES = {
    **{torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"},
    **{torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1", torch.int32: "i32"},
    torch.int64: "i64",
}
# A product of fp32 numbers, unless TF32 is allowed, takes so many times as long as one of bf16.
FP32_PRODUCT = 12
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}  # and where their first factor stands
FREE = {
    *("empty", "new_empty", "empty_like", "empty_strided", "detach", "device", "scalar_tensor"),
}  # operations that start nothing
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One start of a Triton kernel.

    Attributes:
        kernel: the Triton function; arguments: of all its parameters, by name; programs: how many;
        warps, stages: of each.
    """

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Arguments that are known while compiling, as the launcher's specialisation has them."""
        found = {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or one or value is None:
                found[parameter.name] = value
        return found

    def traffic(self, ptx: str) -> float:
        """Bytes of the tensors that its code touches, each moved once."""
        signature, _ = self._signature()
        places = [name for name, kind in signature.items() if kind != "constexpr"]
        used = {int(number) for number in re.findall(r"ld\.param\S*\s.*_param_(\d+)", ptx)}
        tensors = {id(self.arguments[places[i]]): self.arguments[places[i]] for i in used
                   if i < len(places)}  # fmt: skip
        return sum(t.numel() * t.dtype.itemsize for t in tensors.values() if isinstance(t, Tensor))

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for launches of the same code."""
        signature, attributes = self._signature()
        constants = tuple(sorted((name, str(value)) for name, value in self.constants.items()))
        options = (self.warps, self.stages)
        return self.name, tuple(signature.items()), tuple(attributes), constants, options

    def _signature(self) -> tuple[dict[str, str], dict[tuple[int], Any]]:
        signature, attributes = {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            if parameter.name in self.constants:
                signature[parameter.name] = "constexpr"
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = f"*{DTYPES[value.dtype]}"
            elif whole:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            else:
                signature[parameter.name] = "fp32"
            divisible = isinstance(value, Tensor) or (whole and value % 16 == 0)
            if divisible and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        return signature, attributes

    def compiled(self) -> Any:
        """The kernel for sm_90, specialised as a launch would be."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attributes = self._signature()
        names = list(self.arguments)
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@dataclass(frozen=True)
class Operation:
    """A torch operation between the launches: what it moves and multiplies, each number once."""

    name: str
    work: Stage


@dataclass
class _Recorder(TorchDispatchMode):
    steps: list[Launch | Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        out = op(*arguments, **(options or {}))
        name = op.overloadpacket.__name__
        if not (op.is_view or name in FREE or (name == "_to_copy" and out is arguments[0])):
            tensors = [t for t in (*_tensors(arguments), *_tensors((out,))) if t.is_cuda]
            traffic = sum(t.numel() * t.dtype.itemsize for t in tensors)
            self.steps.append(Operation(name, Stage(traffic, _flops(name, arguments))))
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _flops(name: str, arguments: tuple[Any, ...]) -> float:
    if name not in PRODUCTS:
        return 0.0
    first, second = arguments[PRODUCTS[name] : PRODUCTS[name] + 2]
    times = FP32_PRODUCT if first.dtype == torch.float32 else 1
    return 2.0 * math.prod(first.shape) * second.shape[-1] * times


class _Kernel:
    """Stands in for a Triton function: notes its launches."""

    def __init__(self, kernel: Any, steps: list[Launch | Operation]) -> None:
        self.kernel, self.steps = kernel, steps

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            names = [parameter.name for parameter in self.kernel.params]
            given = {**dict(zip(names, values, strict=False)), **named}
            arguments = {name: given[name] for name in names}
            programs = math.prod(grid(arguments) if callable(grid) else grid)
            warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
            self.steps.append(Launch(self.kernel, arguments, programs, warps, stages))

        return launch


def _item(self: Tensor, index: Any) -> Tensor:
    """`self[index]` of slices, numbers and None. A torch without CUDA refuses its own."""
    out, dim = self, 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            out = out.unsqueeze(dim)
        elif isinstance(part, slice):
            start, stop, _ = part.indices(out.shape[dim])
            out = out.narrow(dim, start, stop - start)
        elif part is Ellipsis:
            dim = out.dim() - 1
            continue
        else:
            out, dim = out.select(dim, part % out.shape[dim]), dim - 1
        dim += 1
    return out


def _set_item(self: Tensor, index: Any, value: Any) -> None:
    """Of `self[index] += ...`, which has added already, nothing is left to do."""
    if not (isinstance(value, Tensor) and value._base is self):
        torch.add(_item(self, index), value)  # as much work as the copy


def _copy(self: Tensor, source: Tensor) -> Tensor:
    """`self.copy_(source)`, which a torch without CUDA refuses; what stands in moves as much."""
    torch.neg(source)
    return self


def _contiguous(self: Tensor) -> Tensor:
    return self if self.is_contiguous() else self.clone(memory_format=torch.contiguous_format)


@contextmanager
def recording() -> Iterator[list[Launch | Operation]]:
    """Within it, CUDA tensors have no data, and launches and operations go to the list."""
    recorder = _Recorder()
    with ExitStack() as stack:
        for found in pkgutil.iter_modules([str(KERNELS)]):
            module = importlib.import_module(f"latentwire_fast.kernels.{found.name}")
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel") and hasattr(value, "params"):
                    kernel = _Kernel(value, recorder.steps)
                    stack.enter_context(mock.patch.object(module, name, kernel))
        methods = {"__getitem__": _item, "__setitem__": _set_item, "copy_": _copy}
        methods["contiguous"] = _contiguous
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(Tensor, name, method))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        yield recorder.steps
