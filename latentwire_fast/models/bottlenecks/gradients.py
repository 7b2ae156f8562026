"""Gradients past a choice that has none: what was chosen goes forward, bit for bit.

    sent = pass_gradient(latent, chosen, "rotation")

Shapes: `[..., d]`, one vector per row.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Passing = Literal["straight", "rotation"]
_EPS = 1e-6  # of a vector's length, below which it has no direction


def pass_gradient(source: Tensor, chosen: Tensor, how: Passing) -> Tensor:
    """`chosen`, whose gradient goes to `source`: as it is (straight-through), or turned and scaled
    as `source` would be to become `chosen` (the rotation trick, arXiv:2410.06424)."""
    function = _Straight if how == "straight" else _Rotation
    result: Tensor = function.apply(source, chosen.detach())
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, chosen: Tensor) -> Tensor:
        return chosen.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Rotation(torch.autograd.Function):
    """`chosen = scale * R source` with `R = I - 2 r r^T + 2 q e^T`, where e and q are the two
    directions and r the one half way. R and the scale count as constants."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(source, chosen)
        return chosen.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        source, chosen = ctx.saved_tensors
        length, wanted = (v.norm(dim=-1, keepdim=True) for v in (source, chosen))
        e, q = source / length.clamp(min=_EPS), chosen / wanted.clamp(min=_EPS)
        r = e + q
        r = r / r.norm(dim=-1, keepdim=True).clamp(min=_EPS)

        def along(direction: Tensor) -> Tensor:
            return (direction * grad).sum(-1, keepdim=True)

        turned = wanted / length.clamp(min=_EPS) * (grad - 2 * r * along(r) + 2 * e * along(q))
        return torch.where((length > _EPS) & (wanted > _EPS), turned, grad), None
