"""The nearest code of every row: what codebooks choose by."""

from __future__ import annotations

import torch
from torch import Tensor

from latentwire_fast import reference
from latentwire_fast.errors import KernelError
from latentwire_fast.ops.dispatch import check_float, check_shape, register, uses_triton


def _nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    if uses_triton("nearest_codes", rows, computes_in=rows.dtype):
        from latentwire_fast.kernels import codes as kernels

        return kernels.nearest_codes(rows, codes)
    return reference.nearest_codes(rows, codes)


register(
    "nearest_codes(Tensor rows, Tensor codes) -> Tensor",
    _nearest_codes,
    lambda rows, codes: rows.new_empty((rows.shape[0],), dtype=torch.int64),
)


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """The code with the smallest distance to each row, the first of those that tie. No gradient.

    `argmin_k |c_k|^2 - 2 x . c_k` in fp32, in fp64 where the rows are. A GPU never holds `[N, K]`
    distances. Devices may round differently, and choose another of two codes that are as near.

    Args:
        rows: `[N, d]`, floating point.
        codes: `[K, d]`, at least one.

    Returns:
        `[N]` int64, from 0 to K - 1.

    Raises:
        KernelError: dtype or shape.
    """
    op = "nearest_codes"
    check_float(op, "rows", rows, dims=2)
    check_float(op, "codes", codes, dims=2)
    if rows.dim() != 2 or codes.dim() != 2 or not len(codes):
        raise KernelError(
            f"{op}: rows are {tuple(rows.shape)} and codes {tuple(codes.shape)}; expected [N, d] "
            "and [K, d], with at least one code"
        )
    check_shape(op, "codes", codes, (len(codes), rows.shape[1]), rows)
    found: Tensor = torch.ops.latentwire_fast.nearest_codes(rows.detach(), codes.detach())
    return found
