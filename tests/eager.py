"""Ops written in plain torch, in the dtype at hand: what the project's are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast import reference

# What an error may exceed same-dtype eager's by (the rule of apple/ml-cross-entropy's tests).
EPSILON = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def adapter_parameters(
    inner: int, width: int, dtype: torch.dtype = torch.float64, *, gain: bool = True
) -> dict[str, Tensor]:
    parameters = {
        "weight": torch.randn(width, inner) * inner**-0.5,
        "bias": torch.randn(width) * 0.1,
        "norm_weight": 1 + 0.1 * torch.randn(inner),
        "norm_bias": torch.randn(inner) * 0.1,
        "gamma": 1 + 0.1 * torch.randn(width),
        "beta": torch.randn(width) * 0.01,
    }
    if gain:
        parameters["gain"] = torch.tensor(1.3)
    return {name: value.to(dtype).requires_grad_() for name, value in parameters.items()}


def eager_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    target_rms: float,
    gain: float | Tensor = 1.0,
    calibration: str,
    tanh: bool = False,
) -> Tensor:
    """The plain version with torch's own modules, in the dtypes of its arguments."""
    y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight, bias)
    y = y.tanh() if tanh else y
    if calibration != "none":
        dims = {"token": (-1,), "example": (-2, -1), "batch": tuple(range(y.dim()))}[calibration]
        y = y * (target_rms / (y.square().mean(dims, keepdim=True) + reference.RMS_EPS).sqrt())
    return gamma * (y * gain) + beta
