"""What stops or saves a training run: non-finite values, spikes, memory, touched frozen weights."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latentwire_fast.checkpoint import parameter_digest
from latentwire_fast.errors import TrainingError
from latentwire_fast.storage import write_atomically

logger = logging.getLogger(__name__)
T = TypeVar("T")


def largest_gradient(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Largest absolute gradient value, 0-d; NaN if any is NaN, None if there are no gradients.

    The maximum norm, not the 2-norm: the squares of a finite fp32 gradient may overflow.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    return nn.utils.get_total_norm(gradients, norm_type=math.inf)


class NonFiniteGuard:
    """Stops a run before a NaN or an infinity reaches the optimiser.

    Args:
        run_dir: where `nonfinite.json` is written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.report = run_dir / "nonfinite.json"

    def check(
        self,
        loss: Tensor,
        *,
        step: int,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        example_ids: Sequence[str],
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Call between backward and the optimiser's step; costs one host synchronisation.

        Args:
            loss: 0-d. losses: its named parts, for the report.

        Raises:
            TrainingError: the loss or a gradient is NaN or infinite; the report names step,
                examples and parameters.
        """
        named = list(named_parameters)
        largest = largest_gradient(parameter for _, parameter in named)
        values = loss.detach().float()
        if largest is not None:
            values = torch.stack([values, largest.to(values)])
        if bool(values.isfinite().all()):
            return
        bad = [
            name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        report = {
            "step": step,
            "loss": repr(loss.item()),
            "losses": {name: repr(value.item()) for name, value in (losses or {}).items()},
            "parameters_with_nonfinite_gradients": bad,
            "example_ids": list(example_ids),
        }
        try:
            write_atomically(self.report, json.dumps(report, indent=2) + "\n")
        except OSError as error:
            logger.error("could not write %s (%s): %s", self.report, error, report)
        raise TrainingError(
            f"step {step}: loss {loss.item()}, {len(bad)} parameters with non-finite gradients; "
            f"the optimiser was not stepped. {self.report} lists the examples: look at them, or "
            "lower the learning rate, and resume"
        )


@dataclass
class SpikeGuard:
    """Warns of a loss far above its running mean.

    A spike is `loss > mean + threshold * deviation`, with exponential averages of the loss and of
    its absolute deviation. A spike enters the averages at that limit, so a lasting new level is
    accepted after a few steps.

    Attributes:
        threshold: in mean absolute deviations.
        decay: of the averages, per step.
        warmup: steps before anything is called a spike.
    """

    threshold: float = 8.0
    decay: float = 0.95
    warmup: int = 20
    state: dict[str, float] = field(
        default_factory=lambda: {"mean": 0.0, "deviation": 0.0, "steps": 0}
    )

    def watch(self, loss: float, *, step: int) -> bool:
        """Take in one loss; whether it is a spike."""
        mean, deviation = self.state["mean"], self.state["deviation"]
        limit = mean + self.threshold * deviation
        spike = self.state["steps"] >= self.warmup and loss > limit
        if spike:
            logger.warning(
                "step %d: loss %.4g is a spike (running mean %.4g, limit %.4g)",
                step,
                loss,
                mean,
                limit,
            )
        value = limit if spike else loss
        # the first steps average plainly, as the exponential average starts from nothing
        rate = max(1 - self.decay, 1 / (self.state["steps"] + 1))
        self.state = {
            "mean": mean + rate * (value - mean),
            "deviation": deviation + rate * (abs(value - mean) - deviation),
            "steps": self.state["steps"] + 1,
        }
        return spike


class MicroLoss(NamedTuple):
    """What a loss function returns for some examples.

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
    torch._foreach_div_(gradients, divisor(weight))
    return Accumulated(
        loss=torch.stack(totals).sum() / weight,
        parts={name: torch.stack(values).sum() / weight for name, values in parts.items()},
        weight=weight,
        micro_batch=micro_batch,
    )


class FrozenGuard:
    """Shows that modules which must not change did not.

    Args:
        modules: the frozen modules by name, every parameter with `requires_grad=False`.

    Attributes:
        digests: `parameter_digest` of each module when the guard was made.

    Raises:
        TrainingError: a module has trainable parameters.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        for name, module in self._modules.items():
            trainable = [key for key, p in module.named_parameters() if p.requires_grad]
            if trainable:
                raise TrainingError(
                    f"{name} is not frozen: {len(trainable)} trainable parameters, the first is "
                    f"{trainable[0]}; call requires_grad_(False) on it"
                )
        self.digests = self._digests()

    def _digests(self) -> dict[str, str]:
        return {n: parameter_digest(m.named_parameters()) for n, m in self._modules.items()}

    def verify(self) -> None:
        """Compare with the beginning.

        Raises:
            TrainingError: a parameter changed or holds a gradient; what was trained is not usable.
        """
        for name, module in self._modules.items():
            touched = [key for key, p in module.named_parameters() if p.grad is not None]
            if touched:
                raise TrainingError(f"frozen {name} holds gradients, the first in {touched[0]}")
        for name, digest in self._digests().items():
            if digest != self.digests[name]:
                raise TrainingError(
                    f"frozen {name} changed: parameter digest {digest[:12]}, at the start "
                    f"{self.digests[name][:12]}"
                )
