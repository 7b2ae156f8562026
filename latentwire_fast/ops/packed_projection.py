"""From a payload's codes to prefix embeddings in one op: unpacked on the way to a projection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentwire_fast import reference
from latentwire_fast.ops.dispatch import autocast_dtype, register, uses_triton
from latentwire_fast.ops.projection import (
    PARAMETERS,
    SETTINGS,
    applied,
    checked,
    dense,
    gathered,
    is_empty,
    projection_of,
)
from latentwire_fast.ops.quantization import check_packed, unpack_dequantize
from latentwire_fast.reference import ProjectionParameters


def _dequantize_project_calibrate(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
    *arguments: Any,
) -> Tensor:
    p, settings = gathered(arguments)
    computes_in = torch.float64 if dtype == torch.float64 else torch.float32
    triton = uses_triton("dequantize_project_calibrate", codes, computes_in=computes_in)
    if not triton or is_empty(shape, p.weight):
        return reference.dequantize_project_calibrate(
            *(codes, scales, bits, group_size, shape, dtype), p, settings
        )
    from latentwire_fast.kernels import projection as kernels

    packed = kernels.Packed(
        *(codes.contiguous(), scales.contiguous(), bits, group_size),
        latents=shape[-2],
        width=shape[-1],
        dtype=dtype,
    )
    projection = projection_of(tuple(shape), dtype, p, settings)
    out, _ = kernels.project_calibrate(packed, projection, dense(p.beta))
    return out.view(*shape[:-1], p.weight.shape[0])


register(
    "dequantize_project_calibrate(Tensor codes, Tensor scales, int bits, int group_size, "
    f"SymInt[] shape, ScalarType dtype, {PARAMETERS}, {SETTINGS}) -> Tensor",
    _dequantize_project_calibrate,
    lambda codes, scales, bits, group_size, shape, dtype, weight, *rest: codes.new_empty(
        (*shape[:-1], weight.shape[0]), dtype=dtype
    ),
)


def dequantize_project_calibrate(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    target_rms: float | Tensor | None = None,
    gain: float | Tensor = 1.0,
    calibration: str = "token",
    groups: int = 1,
    tanh: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`project_calibrate` of what `quantize_pack` packed: a payload's codes to prefix embeddings.

    The same as `unpack_dequantize` to fp32 and `project_calibrate`, but on a GPU the unpacked
    latent is never written. Where a parameter's gradient is asked for, the two are called one after
    the other, because backward needs the latent.

    Args:
        codes: `[..., code_bytes(M*d)]` uint8; scales: `[..., ceil(M*d / group_size)]` fp16.
        shape: of the latent, `(..., M, d)`.
        dtype: of the result, and of the rows that are multiplied; autocast's or else the weight's
            unless given.
        bits, group_size: as in `quantize_pack`; the rest, `groups` (of outputs) too: as in
            `project_calibrate`.

    Returns:
        `[..., M, D]`.

    Raises:
        ConfigError: bits, group size, calibration or target_rms.
        KernelError: shapes, dtypes or devices that do not fit.
    """
    op = "dequantize_project_calibrate"
    dtype = autocast_dtype(weight) or weight.dtype if dtype is None else dtype
    check_packed(op, codes, scales, bits=bits, group_size=group_size, shape=shape, dtype=dtype)
    parameters, settings = checked(
        *(op, codes, shape[-1]),
        ProjectionParameters(weight, bias, norm_weight, norm_bias, gamma, beta),
        target_rms=target_rms,
        gain=gain,
        calibration=calibration,
        groups=groups,
        tanh=tanh,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parameters):
        unpacked = torch.float64 if dtype == torch.float64 else torch.float32
        x = unpack_dequantize(
            codes, scales, bits=bits, group_size=group_size, shape=shape, dtype=unpacked
        )
        x = x.to(autocast_dtype(x) or x.dtype)
        return applied(x, parameters, settings).to(dtype)
    batch = math.prod(shape[:-2])
    return torch.ops.latentwire_fast.dequantize_project_calibrate(
        codes.reshape(batch, codes.shape[-1]),
        scales.reshape(batch, scales.shape[-1]),
        *(bits, group_size, shape, dtype, *parameters, *settings),
    )
