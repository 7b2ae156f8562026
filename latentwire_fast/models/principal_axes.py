"""Principal component analysis of vectors that come in batches: the directions in which they differ
most.

Shapes: N vectors, D their width, k axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentwire_fast.errors import DataError

LEAST_SPREAD = 1e-3  # of the first axis's spread: no axis is stretched as if it had less


class PrincipalAxes(NamedTuple):
    """The first axes of a set of vectors, the one with the largest variance first.

    Attributes:
        mean_D: of the vectors, fp32.
        axes_kD: of length 1 and at right angles to each other, fp32. The largest entry of each is
            positive, so that two machines agree on the sign.
        variances_k: of the vectors along each axis, fp32.
        shares_k: the same as shares of their whole variance.
        vectors: how many they are of.
    """

    mean_D: Tensor
    axes_kD: Tensor
    variances_k: Tensor
    shares_k: Tensor
    vectors: int

    def spread_k(self) -> Tensor:
        """The standard deviation along each axis, bounded below (`LEAST_SPREAD`)."""
        spread_k = self.variances_k.sqrt()
        return spread_k.clamp(min=float(spread_k[0]) * LEAST_SPREAD or 1.0)


class Moments:
    """Count, sum and sum of squares of vectors, in fp64: all that the axes are made of.

    Args:
        width: D.
        device: where the sums are.
    """

    def __init__(self, width: int, *, device: torch.device | None = None) -> None:
        self.count = 0
        self._sum_D = torch.zeros(width, dtype=torch.float64, device=device)
        self._square_DD = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows_ND: Tensor, times_N: Tensor | None = None) -> None:
        """Take in vectors.

        Args:
            times_N: how often each of them is there; once, if not given.
        """
        rows_ND = rows_ND.to(self._sum_D)
        weighted_ND = rows_ND
        if times_N is not None:
            weighted_ND = rows_ND * times_N.to(rows_ND)[:, None]
        self.count += len(rows_ND) if times_N is None else int(times_N.sum())
        self._sum_D += weighted_ND.sum(0)
        self._square_DD += weighted_ND.T @ rows_ND

    def axes(self, count: int) -> PrincipalAxes:
        """The first `count` axes, at most D.

        Raises:
            DataError: no more vectors than axes, which say nothing of the others then.
        """
        if self.count <= count:
            raise DataError(
                f"{self.count} vectors are too few for {count} principal axes; fit to more texts"
            )
        mean_D = self._sum_D / self.count
        covariance_DD = self._square_DD / self.count - mean_D[:, None] * mean_D
        variances_D, vectors_DD = torch.linalg.eigh(covariance_DD)  # the smallest first
        variances_k = variances_D.flip(0)[:count].clamp(min=0)
        axes_kD = vectors_DD.T.flip(0)[:count]
        largest_k1 = axes_kD.abs().argmax(1, keepdim=True)
        axes_kD = axes_kD * axes_kD.gather(1, largest_k1).sign()
        whole = covariance_DD.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
        return PrincipalAxes(
            mean_D=mean_D.float(),
            axes_kD=axes_kD.float().contiguous(),
            variances_k=variances_k.float(),
            shares_k=(variances_k / whole).float(),
            vectors=self.count,
        )
