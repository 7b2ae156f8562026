"""Optimisers: Muon for the weight matrices of blocks, AdamW for everything else.

Measured on the testbed at equal time: AdamW alone reached F1 0.07 where this pair had 0.60
(readers), and 0.07 against 0.69 (latents).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

# A matrix narrower than this (slot biases, gates) gains nothing from orthogonalised updates.
MUON_MIN_SIDE = 16


def split_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW). Tables that are looked up or queried stay with
    AdamW."""
    tables = ("embed", "slot", "quer", "memory", "position")
    matrices, others = [], []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() == 2 and min(parameter.shape) >= MUON_MIN_SIDE
        if is_matrix and not any(t in name for t in tables):
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    muon_lr: float | None,
    adamw_lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[torch.optim.Optimizer]:
    """The optimisers for a set of named parameters; each group remembers its `base_lr`.

    Args:
        muon_lr: learning rate of Muon (momentum 0.95); None trains everything with AdamW.
        adamw_lr: learning rate of AdamW.
        weight_decay: decoupled decay of the Muon matrices.
        lr_scale: factor on the learning rate of a parameter, by its name.
    """
    scales: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        scales.setdefault(lr_scale(name), []).append((name, parameter))
    muon_groups, adamw_groups = [], []
    for scale, part in sorted(scales.items(), reverse=True):
        matrices, others = split_parameters(part)
        if muon_lr is None:
            others = matrices + others
        elif matrices:
            muon_groups.append({"params": matrices, "lr": muon_lr * scale})
        if others:
            adamw_groups.append({"params": others, "lr": adamw_lr * scale})
    optimizers: list[torch.optim.Optimizer] = []
    if muon_groups:
        optimizers.append(torch.optim.Muon(muon_groups, momentum=0.95, weight_decay=weight_decay))
    if adamw_groups:
        optimizers.append(torch.optim.AdamW(adamw_groups, betas=betas, weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def scale_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its base learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
