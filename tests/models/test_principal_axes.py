"""Principal components against torch's SVD, in batches and with weights."""

from __future__ import annotations

import pytest
import torch

from latentwire_fast.errors import DataError
from latentwire_fast.models.principal_axes import Moments


def test_axes_are_those_of_the_svd() -> None:
    rows = torch.randn(200, 12) @ torch.diag(torch.arange(1.0, 13.0)) + 100
    moments = Moments(12)
    for part in rows.split(7):
        moments.add(part)
    axes = moments.axes(5)
    centred = (rows - rows.mean(0)).double()
    _, sizes, wanted = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(axes.mean_D, rows.mean(0))
    torch.testing.assert_close(axes.variances_k, (sizes[:5] ** 2 / 200).float(), rtol=1e-4, atol=0)
    shares = sizes[:5] ** 2 / (sizes**2).sum()
    torch.testing.assert_close(axes.shares_k, shares.float(), rtol=1e-4, atol=0)
    cosines = (axes.axes_kD.double() * wanted[:5]).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones(5).double(), rtol=1e-4, atol=0)
    assert (axes.axes_kD.gather(1, axes.axes_kD.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_weight_is_a_repetition() -> None:
    rows, times = torch.randn(20, 6), torch.randint(0, 5, (20,))
    weighted, plain = Moments(6), Moments(6)
    weighted.add(rows, times)
    plain.add(rows.repeat_interleave(times, 0))
    ours, wanted = weighted.axes(3), plain.axes(3)
    assert ours.vectors == wanted.vectors == int(times.sum())
    torch.testing.assert_close(ours.axes_kD, wanted.axes_kD)
    torch.testing.assert_close(ours.shares_k, wanted.shares_k)


def test_vectors_without_variance_have_axes_too() -> None:
    moments = Moments(4)
    moments.add(torch.ones(9, 4))
    axes = moments.axes(2)
    assert axes.shares_k.tolist() == [0.0, 0.0]
    assert torch.isfinite(1 / axes.spread_k()).all()


def test_too_few_vectors_are_refused() -> None:
    moments = Moments(8)
    moments.add(torch.randn(3, 8))
    with pytest.raises(DataError, match="3 vectors are too few for 3 principal axes"):
        moments.axes(3)
