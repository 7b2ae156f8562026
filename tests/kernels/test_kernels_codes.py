"""The kernel of nearest codes: the reference's choice, on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

from kernel_device import DEVICE, assert_guards_hold, guard_outputs, needs_kernels
from latentwire_fast import ops, reference

pytestmark = needs_kernels


@pytest.mark.parametrize(("rows", "codes", "width"), [(70, 100, 16), (33, 64, 5), (5, 7, 40)])
def test_the_codes_equal_the_reference(
    rows: int, codes: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, c = torch.randn(rows, width), torch.randn(codes, width)
    c[3] = c[1]  # ties, which the first wins
    x[:4] = c[[1, 3, 0, codes - 1]]
    buffers = guard_outputs(monkeypatch)
    with ops.backend("triton"):
        found = ops.nearest_codes(x.to(DEVICE), c.to(DEVICE))
    assert torch.equal(found.cpu(), reference.nearest_codes(x, c))
    assert found[:4].tolist() == [1, 1, 0, codes - 1]
    assert_guards_hold(buffers)


def test_ties_of_different_blocks_and_strided_rows_in_half_precision() -> None:
    torch.manual_seed(0)
    c = torch.randn(20, 8).half().repeat(10, 1)
    x = torch.randn(8, 30).half().T
    with ops.backend("triton"):
        found = ops.nearest_codes(x.to(DEVICE), c.to(DEVICE))
        none = ops.nearest_codes(x[:0].to(DEVICE), c.to(DEVICE))
    assert torch.equal(found.cpu(), reference.nearest_codes(x, c[:20]))
    assert none.shape == (0,)


def test_rows_of_no_number_get_a_code() -> None:
    x, c = torch.full((3, 4), float("nan")), torch.randn(5, 4)
    with ops.backend("triton"):
        assert ops.nearest_codes(x.to(DEVICE), c.to(DEVICE)).tolist() == [0, 0, 0]
    assert reference.nearest_codes(x, c).tolist() == [0, 0, 0]
