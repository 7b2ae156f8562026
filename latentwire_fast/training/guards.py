"""Guards of a training run: non-finite values, loss spikes, memory, changed frozen weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast.errors import TrainingError
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.readers.lora import base_parameters
from latentwire_fast.readers.weights import weights_digest

logger = logging.getLogger(__name__)


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
        report: the JSON file that is written when it stops one.
    """

    def __init__(self, report: Path) -> None:
        self.report = report

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
    accepted after a few steps. Each stage begins anew: its objectives are of another size.

    Attributes:
        threshold: in mean absolute deviations.
        decay: of the averages, per step.
        warmup: steps before anything is called a spike.
    """

    threshold: float = 8.0
    decay: float = 0.95
    warmup: int = 20
    state: dict[str, Any] = field(default_factory=dict)

    def watch(self, loss: float, *, step: int, stage: str) -> bool:
        """Take in one loss of a stage; whether it is a spike."""
        if self.state.get("stage") != stage:
            self.state = {"stage": stage, "mean": 0.0, "deviation": 0.0, "steps": 0}
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
            "stage": stage,
            "mean": mean + rate * (value - mean),
            "deviation": deviation + rate * (abs(value - mean) - deviation),
            "steps": self.state["steps"] + 1,
        }
        return spike


class FrozenGuard:
    """Shows that modules which must not change did not.

    Args:
        modules: the frozen modules by name, every parameter with `requires_grad=False`. Low-rank
            updates of readers are none of them.

    Attributes:
        digests: `weights_digest` of each module when the guard was made.

    Raises:
        TrainingError: a module has trainable parameters.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        for name, module in self._modules.items():
            trainable = [key for key, p in base_parameters(module) if p.requires_grad]
            if trainable:
                raise TrainingError(
                    f"{name} is not frozen: {len(trainable)} trainable parameters, the first is "
                    f"{trainable[0]}; call requires_grad_(False) on it"
                )
        self.digests = self._digests()

    def _digests(self) -> dict[str, str]:
        return {name: weights_digest(module) for name, module in self._modules.items()}

    def verify(self) -> None:
        """Compare with the beginning.

        Raises:
            TrainingError: a parameter changed or holds a gradient; what was trained is not usable.
        """
        for name, module in self._modules.items():
            touched = [key for key, p in base_parameters(module) if p.grad is not None]
            if touched:
                raise TrainingError(f"frozen {name} holds gradients, the first in {touched[0]}")
        for name, digest in self._digests().items():
            if digest != self.digests[name]:
                raise TrainingError(
                    f"frozen {name} changed: parameter digest {digest[:12]}, at the start "
                    f"{self.digests[name][:12]}"
                )
