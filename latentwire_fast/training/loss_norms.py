"""The gradient of each loss by itself: which of a stage's objectives pulls how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from latentwire_fast.config.schema import StageConfig
from latentwire_fast.objectives.prepared import Key, PreparedItem
from latentwire_fast.training.optimizer_state import restore_rng_state, rng_state
from latentwire_fast.training.session import Session


def loss_gradient_norms(
    session: Session,
    accelerator: Accelerator,
    items: Sequence[PreparedItem],
    stage: StageConfig,
    counts: Mapping[Key, int],
) -> dict[str, float]:
    """2-norm of the gradient of each weighted loss over a micro-batch, as `OBJECTIVE/READER`.

    It costs a forward pass and a backward pass per loss, and draws the random numbers that the
    step draws (dropout): these are put back behind it.

    Args:
        items: the process's part of the batch; so many as fit in memory at once are taken.
        counts: of the whole batch, by which losses are divided.
    """
    tensors, state = rng_state({})
    parameters = [p for p in session.state.parameters if not _is_in(p, session.held(stage))]
    with accelerator.autocast():
        losses = session.objectives.compute(items[: session.state.micro_batch], stage, counts)
    norms = {}
    for (objective, reader), term in losses.terms.items():
        if not term.requires_grad:
            continue
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        total = nn.utils.get_total_norm([g for g in found if g is not None])
        norms[f"{objective}/{reader}"] = total.item()
    restore_rng_state({}, tensors=tensors, state=state)
    return norms


def _is_in(parameter: nn.Parameter, held: Sequence[nn.Parameter]) -> bool:
    return any(parameter is other for other in held)
