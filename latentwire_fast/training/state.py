"""The state that a run's next step depends on, saved and restored as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentwire_fast.config.stage import HandOver
from latentwire_fast.errors import CheckpointError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from latentwire_fast.training.guards import SpikeGuard
from latentwire_fast.training.hand_over import hand_over
from latentwire_fast.training.levels import Gates
from latentwire_fast.training.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
    restore_rng_state,
)
from latentwire_fast.training.time_limit import Pace

logger = logging.getLogger(__name__)


class Trained(Protocol):
    """What is trained: its tensors by name, those of them that get gradients, and their return."""

    def trained_state(self) -> dict[str, Tensor]: ...

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]: ...

    def eval(self) -> Any: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass
class TrainingState:
    """Weights, optimisers, counters and, in checkpoints, the random state of every process.

    Attributes:
        micro_batch: examples per forward pass that fit in memory.
        step: steps done. previous: the one that was done last. seconds: what they took.
        cache_seconds: how many of these went into what is kept on disk, which is computed once.
        pace: how long a step takes now; a process that goes on measures it anew.
        gates: what schedules that go by the accuracy have seen.
        spikes: the guard's running means.
        validations: the results so far (see `validation.py`).
    """

    model: Trained
    optimizers: Sequence[torch.optim.Optimizer]
    micro_batch: int
    step: int = 0
    previous: int = -1
    seconds: float = 0.0
    cache_seconds: float = 0.0
    pace: Pace = field(default_factory=Pace)
    gates: Gates = field(default_factory=Gates)
    spikes: SpikeGuard = field(default_factory=SpikeGuard)
    validations: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters by name."""
        return self.model.trained_parameters()

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for _, parameter in self.named]

    def took(self, seconds: float, *, for_cache: float, stage: str) -> None:
        """A step of a stage took so long; of that, so long for what is kept on disk."""
        self.seconds += seconds
        self.cache_seconds += for_cache
        self.pace.add(seconds - for_cache, stage=stage)

    def save(
        self,
        folder: Path,
        *,
        rng: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        readers: Mapping[str, str],
        data: str,
    ) -> None:
        """Write a checkpoint.

        Args:
            rng: `rng_state` of every process, in their order.
            readers: fingerprints by name, for the record.
            data: the digest of the training data.

        Raises:
            CheckpointError: the disk refused; earlier checkpoints are intact.
        """
        model = self.model.trained_state()
        optimizer_tensors, optimizer_json = optimizer_state(self.optimizers, self.named)
        save_checkpoint(
            folder,
            step=self.step,
            tensors={
                "model": model,
                "optimizer": optimizer_tensors,
                **{f"rng.{rank}": tensors for rank, (tensors, _) in enumerate(rng)},
            },
            state={
                "optimizer": optimizer_json,
                "rng": [values for _, values in rng],
                "spikes": self.spikes.state,
                "gates": self.gates.state,
                "validations": self.validations,
                "seconds": self.seconds,
                "cache_seconds": self.cache_seconds,
                "micro_batch": self.micro_batch,
                "model_digest": parameter_digest(model.items()),
                "trained_parameters": sum(p.numel() for p in self.parameters),
                "readers": readers,
                "data": data,
            },
        )

    def restore(
        self,
        folder: Path,
        *,
        rank: int,
        processes: int,
        data: str,
        hand_over_at: Callable[[int], HandOver],
    ) -> bool:
        """Go back to the newest intact checkpoint; False where there is none.

        Args:
            rank: of this process, whose random state is restored, among `processes`.
            data: the digest of the training data as it is now.
            hand_over_at: how a checkpoint of that step with more latents is taken over.

        Raises:
            CheckpointError: all checkpoints are damaged, or of another run or other data.
        """
        path = latest_checkpoint(folder)
        if path is None:
            return False
        checkpoint = load_checkpoint(path)
        digest = parameter_digest(checkpoint.tensors["model"].items())
        if digest != checkpoint.state["model_digest"]:
            raise CheckpointError(f"{path}: the model's weights do not match their digest")
        if checkpoint.state.get("data", data) != data:
            raise CheckpointError(
                f"{path}: the training data has changed since; put back the file as it was, or "
                "start a new run"
            )
        saved, own = checkpoint.tensors["model"], self.model.trained_state()
        if any(n in saved and saved[n].shape != tensor.shape for n, tensor in own.items()):
            how = hand_over_at(checkpoint.step)
            self.model.load_state_dict(hand_over(saved, own, how))
            logger.info("step %d: fewer latents from here on", checkpoint.step)
        else:
            self.model.load_state_dict(saved)
            load_optimizer_state(
                self.optimizers,
                self.named,
                tensors=checkpoint.tensors["optimizer"],
                state=checkpoint.state["optimizer"],
            )
        _restore_rng(checkpoint, rank=rank, processes=processes)
        self.spikes.state = checkpoint.state["spikes"]
        self.gates.state = checkpoint.state.get("gates", Gates().state)
        self.validations = checkpoint.state.get("validations", [])
        self.seconds = checkpoint.state["seconds"]
        self.cache_seconds = checkpoint.state.get("cache_seconds", 0.0)
        self.micro_batch = checkpoint.state["micro_batch"]
        self.step, self.previous = checkpoint.step, checkpoint.step - 1
        return True


def _restore_rng(checkpoint: Checkpoint, *, rank: int, processes: int) -> None:
    """A process's own random state; another number of processes than saved is a warning."""
    saved = checkpoint.state["rng"]
    if len(saved) != processes:
        logger.warning(
            "saved by %d processes, resumed by %d: random numbers (dropout) will differ",
            len(saved),
            processes,
        )
    if rank < len(saved):
        restore_rng_state({}, tensors=checkpoint.tensors[f"rng.{rank}"], state=saved[rank])
