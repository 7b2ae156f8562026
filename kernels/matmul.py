"""The matrix product that the kernels leave to cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices of one dtype, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
