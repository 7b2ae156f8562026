"""Which implementation an op runs, how ops are registered, and the checks that they share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from latentwire_fast.errors import ConfigError, KernelError

Backend = Literal["auto", "reference", "triton"]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_backend: Backend = "auto"
_library = torch.library.Library("latentwire_fast", "DEF")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the implementation of every op inside the block, for the whole process.

    `auto` is Triton on CUDA tensors and the reference on CPU; `reference` and `triton` force one.
    With `TRITON_INTERPRET=1` in the environment, `triton` runs the kernels interpreted on CPU
    tensors.

    Raises:
        ConfigError: an unknown name.
        KernelError: `triton` without a GPU; inside the block, `triton` on a CPU tensor.
    """
    global _backend
    one_of("backend", "name", name, ("auto", "reference", "triton"))
    if name == "triton" and not (torch.cuda.is_available() or interpreted()):
        raise KernelError(
            "backend('triton') needs a CUDA device and torch sees none; use 'auto' or 'reference', "
            "or set TRITON_INTERPRET=1 before starting Python to run the kernels interpreted (slow)"
        )
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(op: str, x: Tensor, *, computes_in: torch.dtype = torch.float32) -> bool:
    """Whether this call goes to the Triton kernel; the reference otherwise.

    The kernels compute in fp32. What is to be computed in fp64 is the reference's on every device.
    """
    if _backend == "triton" and not x.is_cuda and not interpreted():
        raise KernelError(
            f"{op}: backend 'triton' on a tensor on {x.device}; move it to a CUDA device"
        )
    if _backend == "triton" and computes_in == torch.float64:
        raise KernelError(f"{op}: backend 'triton' on fp64 tensors; use 'auto' or 'reference'")
    if _backend == "auto":
        return x.is_cuda and computes_in != torch.float64
    return _backend == "triton"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that `torch.autocast` multiplies in where x is; None where it is off, or x is fp64.

    Ops ask before they are dispatched: inside them it is off.
    """
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def register(schema: str, implementation: Any, fake: Any) -> None:
    """Define an op with one Python implementation for CPU and CUDA, and its shape function."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    for device in ("cpu", "cuda"):
        _library.impl(name, _on_its_device(implementation, device), device.upper())
    torch.library.register_fake(f"latentwire_fast::{name}", fake, lib=_library)


def _on_its_device(implementation: Any, device: str) -> Any:
    """The op as it is registered, run where its first tensor is, and without autocast.

    Triton launches on the current GPU, which another device's reader is not on. Autocast would
    compute the reference's fp32 formulas in the half precision of the layers round the op.
    """

    def run(x: Tensor, *arguments: Any) -> Any:
        if device == "cpu" and not torch.is_autocast_enabled(device):
            return implementation(x, *arguments)  # a small op's time is its overhead
        with torch.cuda.device_of(x), torch.autocast(device, enabled=False):
            return implementation(x, *arguments)

    return run


def one_of(op: str, argument: str, value: object, allowed: tuple[object, ...]) -> None:
    # By type too: 4.0 equals 4, and is no number of bits.
    if (type(value), value) not in [(type(a), a) for a in allowed]:
        raise ConfigError(f"{op}: {argument} is {value!r}; expected one of {allowed}")


def is_number(value: object) -> bool:
    """A finite real number, of Python's or numpy's; no text, truth value or tensor."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def check_positive(op: str, argument: str, value: object, *, otherwise: str = "") -> None:
    """Args: otherwise: what else would do, for the message."""
    if not (is_number(value) and value > 0):  # type: ignore[operator]
        raise ConfigError(f"{op}: {argument} is {value!r}; expected a positive number{otherwise}")


def check_tensor(op: str, argument: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise KernelError(f"{op}: {argument} is a {type(x).__name__}; expected a tensor")


def check_float(op: str, argument: str, x: Tensor, *, dims: int) -> None:
    check_tensor(op, argument, x)
    if x.dtype not in FLOATS:
        raise KernelError(f"{op}: {argument} is {x.dtype}; expected a floating-point tensor")
    if x.dim() < dims:
        raise KernelError(
            f"{op}: {argument} has shape {tuple(x.shape)}; expected at least {dims} dimensions"
        )


def check_shape(
    op: str, argument: str, x: Tensor | None, shape: tuple[int, ...], on: Tensor
) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise KernelError(f"{op}: {argument} has shape {tuple(x.shape)}; expected {shape}")
    if x is not None and x.device != on.device:
        raise KernelError(
            f"{op}: {argument} is on {x.device}; expected {on.device}, like the input"
        )
