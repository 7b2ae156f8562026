"""Muon, whose orthogonalisation runs in fp32 on a CPU.

`torch.optim.Muon` runs it in bf16. A GPU is made for that; a CPU without bf16 instructions emulates
each of them: one step of the preset `testbed` took 16 to 36 times as long as in fp32. And bf16
rounds so coarsely that two processes come to other losses than one.

Shapes: N matrices of one shape in a stack, R rows and C columns, R <= C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# One stack holds at most this many values (64 MiB), so that a large LM's copies stay few.
STACK_VALUES = 2**24


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same arguments, state and update, in fp32 on a CPU.

    The update is the same polynomial of the momentum; only its rounding differs. Parameters on
    another device are left to torch's own step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimiser step; returns what `closure` returns, if it is given."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group(group, parameters, gradients, momenta)
        if not parameters:
            return
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        lr = float(group["lr"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        for members in _stacks(updates):
            stack_NRC = torch.stack([_wide(updates[i]) for i in members])
            orthogonal_NRC = orthogonalize(
                stack_NRC,
                coefficients=group["ns_coefficients"],
                steps=group["ns_steps"],
                eps=group["eps"],
            )
            for i, orthogonal_RC in zip(members, orthogonal_NRC, strict=True):
                parameter = parameters[i]
                update = (
                    orthogonal_RC if parameter.shape == orthogonal_RC.shape else orthogonal_RC.T
                )
                factor = _rate_factor(parameter, group["adjust_lr_fn"])
                parameter.add_(update, alpha=-lr * factor)


def orthogonalize(
    stack_NRC: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz iterations: matrices `[N, R, C]` whose singular values are all near 1.

    With X the matrix over its norm, each step is X <- (a I + b X X^T + c (X X^T)^2) X. Where C is
    at least 2 R, the steps are taken on the smaller G = X X^T and their product Q is applied once:
    the same polynomial, with fewer products (half the time at C = 4 R).

    Args:
        stack_NRC: in fp32 or fp64, R <= C.
        coefficients: a, b and c.
        eps: the least norm that a matrix is divided by.
    """
    a, b, c = coefficients
    x_NRC = stack_NRC / stack_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    if x_NRC.shape[2] < 2 * x_NRC.shape[1]:
        for _ in range(steps):
            gram_NRR = x_NRC @ x_NRC.mT
            factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
        return x_NRC
    gram_NRR = x_NRC @ x_NRC.mT
    product_NRR = torch.eye(x_NRC.shape[1], dtype=x_NRC.dtype).expand_as(gram_NRR)
    for step in range(steps):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=1, dim2=2).add_(a)
        product_NRR = factor_NRR if step == 0 else factor_NRR @ product_NRR
        if step + 1 < steps:
            gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
    return product_NRR @ x_NRC


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices that go through the iterations together: those of one shape, or of its
    transpose, as many as `STACK_VALUES` allows."""
    alike: dict[tuple[torch.dtype, int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.dtype, *_wide(matrix).shape), []).append(i)
    for (_, rows, columns), members in alike.items():
        size = max(1, STACK_VALUES // (rows * columns))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _rate_factor(parameter: Tensor, rule: str | None) -> float:
    """torch's factor on the learning rate for a matrix's shape, by the optimiser's
    `adjust_lr_fn`."""
    rows, columns = parameter.shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
