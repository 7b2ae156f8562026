"""The matrix products that the kernels leave to cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_fp32(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`a @ b` of two matrices of one dtype, accumulated and returned in fp32, in `out` if given."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_matmul_fp32(out: Tensor, a: Tensor, b: Tensor, *, by: float) -> None:
    """`out += by * (a @ b)` in its place, of two matrices of one dtype; accumulated in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, alpha=by, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float(), alpha=by)
