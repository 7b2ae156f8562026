"""Gradient accumulation over micro-batches, halved when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latentwire_fast.errors import TrainingError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class MicroLoss(NamedTuple):
    """Sums that a loss function returns for some examples.

    Attributes:
        total: the *summed* loss, 0-d.
        weight: what the sum is to be divided by (target tokens, examples); a host number.
        parts: named sums to report, divided by the same weight.
    """

    total: Tensor
    weight: float
    parts: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Accumulated:
    """One batch's result; the gradients are in the parameters.

    Attributes:
        loss: mean over the batch's weight, 0-d, detached. parts: the same for the named parts.
        weight: summed over the batch.
        micro_batch: the size that fitted; start the next step with it.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    weight: float
    micro_batch: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU or the host ran out of memory."""
    signs = ("out of memory", "DefaultCPUAllocator: can't allocate")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def run_accumulated(
    examples: Sequence[T],
    *,
    loss_fn: Callable[[Sequence[T]], MicroLoss],
    parameters: Sequence[nn.Parameter],
    micro_batch: int,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    divisor: Callable[[float], float] = float,
) -> Accumulated:
    """Leave the gradient of the weighted mean loss over `examples` in `parameters`.

    Sums are accumulated and divided by the whole weight once, so the gradient does not depend on
    how the batch is cut. When memory runs out, the step starts again from zero gradients with half
    the micro-batch and twice the accumulation: the effective batch stays.

    With several processes neither `loss_fn` nor `backward` may communicate (one may retry while the
    others do not): reduce the gradients afterwards, and let `divisor` agree on the weight.

    Args:
        loss_fn: must give the same sums however the examples are grouped.
        micro_batch: examples per forward pass to begin with.
        backward: `accelerator.backward`, for one.
        divisor: from this process's weight to what its summed gradients are divided by.

    Raises:
        TrainingError: one example alone does not fit, or the batch weighs nothing.
    """
    while True:
        try:
            return _accumulate(examples, loss_fn, parameters, micro_batch, backward, divisor)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried = min(micro_batch, len(examples))
            if tried == 1:
                raise TrainingError(
                    "out of memory with one example per forward pass; shorten the examples, switch "
                    f"on gradient checkpointing, or use a smaller model ({error})"
                ) from error
            message = str(error).splitlines()[0]
        # Outside the handler: the traceback that held the failed pass's tensors is gone.
        micro_batch = tried // 2
        logger.warning("out of memory (%s): micro-batches of %d from now on", message, micro_batch)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _accumulate(
    examples: Sequence[T],
    loss_fn: Callable[[Sequence[T]], MicroLoss],
    parameters: Sequence[nn.Parameter],
    micro_batch: int,
    backward: Callable[[Tensor], Any],
    divisor: Callable[[float], float],
) -> Accumulated:
    for parameter in parameters:
        parameter.grad = None
    weight, totals, parts = 0.0, list[Tensor](), dict[str, list[Tensor]]()
    for start in range(0, len(examples), micro_batch):
        micro = MicroLoss(*loss_fn(examples[start : start + micro_batch]))
        backward(micro.total)
        weight += micro.weight
        totals.append(micro.total.detach())
        for name, value in micro.parts.items():
            parts.setdefault(name, []).append(value.detach())
    if weight <= 0:
        raise TrainingError(f"a batch of {len(examples)} examples has no weight: no target tokens")
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = divisor(weight)
    if gradients:  # none where a schedule gives all losses a weight of 0
        torch._foreach_div_(gradients, whole)
    return Accumulated(
        loss=torch.stack(totals).sum() / weight,
        parts={name: torch.stack(values).sum() / weight for name, values in parts.items()},
        weight=weight,
        micro_batch=micro_batch,
    )
