"""One optimiser step: batch, losses, gradients, guards, update."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.data.streams import TrainItem
from latentwire_fast.files.tensor_cache import seconds_computing
from latentwire_fast.objectives.objective_set import Losses
from latentwire_fast.objectives.prepared import Key, PreparedItem, total_counts
from latentwire_fast.schedules.base import build_schedule
from latentwire_fast.training.accumulation import Accumulated, MicroLoss, run_accumulated
from latentwire_fast.training.distributed import Reducer
from latentwire_fast.training.loss_norms import loss_gradient_norms
from latentwire_fast.training.optimizers import scale_learning_rates
from latentwire_fast.training.session import Session
from latentwire_fast.training.state import TrainingState
from latentwire_fast.training.time_limit import passes
from latentwire_fast.training.tracking import module_gradient_norms

LOSSES = "losses"  # the group of a step's parts that holds its losses; other groups are measures


@dataclass(frozen=True)
class StepResult:
    """The result of one optimiser step.

    Attributes:
        step: its 0-based number.
        stage: the stage that it was of. facts: the curriculum's level.
        levels: the stage's scheduled numbers, by place.
        loss: of the global batch, 0-d.
        parts: its named parts as `GROUP/NAME`: `losses/answer/llama`, `accuracy/llama`.
        lr: the factor on the learning rates.
        grad_norm: 2-norm of all gradients before clipping, 0-d. grad_norms: by module.
        loss_norms: gradient norms by loss, where they were measured.
        latent_BMd: the latents of this process's items, not quantised.
        first_ids: by reader, the most probable first tokens of their answers, where measured.
        tokens: how many tokens the readers predicted. seconds: what the step took.
    """

    step: int
    stage: StageConfig
    facts: int
    levels: Mapping[str, float]
    loss: Tensor
    parts: Mapping[str, Tensor]
    lr: float
    grad_norm: Tensor
    grad_norms: Mapping[str, float]
    loss_norms: Mapping[str, float]
    latent_BMd: Tensor
    first_ids: Mapping[str, Tensor]
    tokens: int
    seconds: float

    def record(self, session: Session) -> dict[str, Any]:
        """The step's line in `diagnostics.jsonl`."""
        return {
            "step": self.step,
            "stage": self.stage.name,
            "facts": self.facts,
            **({"levels": self.levels} if self.levels else {}),
            "loss": self.loss.item(),
            **by_group(self.parts),
            "lr": self.lr,
            "grad_norm": self.grad_norm.item(),
            "grad_norms": self.grad_norms,
            **({"loss_norms": self.loss_norms} if self.loss_norms else {}),
            **session.describe(self.latent_BMd),
            **session.describe_first_tokens(self.first_ids),
            "tokens_per_second": self.tokens / self.seconds,
            "seconds": session.state.seconds,
            "cache_seconds": session.state.cache_seconds,
        }


def by_group(parts: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The parts of a step as numbers, by group: `losses` and `accuracy` always, other measures
    where there are any."""
    groups: dict[str, dict[str, float]] = {LOSSES: {}, "accuracy": {}}
    for key, value in parts.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value.item()
    return groups


def is_logged(config: RunConfig, state: TrainingState) -> bool:
    """Whether the next step gets a record: every `log_every`, and the last."""
    is_due = passes(state.previous, state.step, config.log_every)
    return is_due or state.step + 1 == config.total_steps


def facts_at(config: RunConfig, step: int) -> int:
    """The testbed's facts per passage at a 0-based step."""
    stage, done = config.stage_at(step)
    if stage.facts is None:
        return config.data.facts
    return int(build_schedule(stage.facts).value(done, stage.steps))


def lr_factor(config: RunConfig, step: int) -> float:
    """The factor on the learning rates at a 0-based step: the run's schedule times its stage's."""
    stage, _ = config.stage_at(step)
    return stage.lr * build_schedule(config.optim.lr_schedule).value(step, config.total_steps)


def train_step(session: Session, accelerator: Accelerator, reducer: Reducer) -> StepResult:
    """Do the next optimiser step of a session. Its counter is left to the caller.

    Raises:
        TrainingError: non-finite values, or one example alone does not fit into memory.
    """
    config, state = session.config, session.state
    start, cache_start = time.perf_counter(), seconds_computing()
    stage, done = config.stage_at(state.step)
    facts, factor = facts_at(config, state.step), lr_factor(config, state.step)
    batch = _batch(session, stage, facts, done)
    levels = state.gates.levels(stage, done)
    session.objectives.set_levels(stage, levels)
    items = session.objectives.prepare(
        batch[accelerator.process_index :: accelerator.num_processes],
        stage,
        session.active_readers(),
    )
    counts = reducer.counts(total_counts(items))
    loss_norms = _loss_norms(session, accelerator, items, stage, counts)
    answers = sum(turn.answer is not None for item in batch for turn in item.turns)
    is_measured = stage.needs_accuracy or is_logged(config, state)
    result, made = _accumulate(
        session, accelerator, items, stage, counts, answers=answers if is_measured else 0
    )
    state.micro_batch = result.micro_batch
    for parameter in session.held(stage):  # with a gradient of zeros momentum would move it on
        parameter.grad = None
    reducer.gradients(state.parameters)
    loss, parts = reducer.values(result.loss, result.parts)
    state.gates.watch(stage, parts)
    norms = module_gradient_norms(session.parts()) if is_logged(config, state) else {}
    session.nonfinite.check(
        loss,
        step=state.step,
        named_parameters=state.named,
        example_ids=[item.id for item in batch],
        losses={k.removeprefix(f"{LOSSES}/"): v for k, v in parts.items()},
    )
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, config.optim.clip)
    scale_learning_rates(state.optimizers, factor)
    state.spikes.watch(loss.item(), step=state.step, stage=stage.name)
    for optimizer in state.optimizers:
        optimizer.step()
    latent_BMd = torch.cat([losses.latent_BMd for losses in made])
    if session.wants_latents:
        session.after_step(stage, reducer.each(latent_BMd))
    elapsed = time.perf_counter() - start
    state.took(elapsed, for_cache=seconds_computing() - cache_start, stage=stage.name)
    return StepResult(
        step=state.step,
        stage=stage,
        facts=facts,
        levels=levels,
        loss=loss,
        parts=parts,
        lr=factor,
        grad_norm=norm,
        grad_norms=norms,
        loss_norms=loss_norms,
        latent_BMd=latent_BMd,
        first_ids=_joined([losses.first_ids for losses in made]),
        tokens=session.objectives.tokens(stage, counts),
        seconds=elapsed,
    )


def _batch(session: Session, stage: StageConfig, facts: int, done: int) -> list[TrainItem]:
    """The items of the next step, of all processes, behind so many steps of its stage."""
    size = stage.batch_size or session.config.optim.batch_size
    stream, step = session.data.stream_of(stage), session.state.step
    counted = session.state.gates.text_batches(stage, done)
    return stream.batch(step, size, facts=facts, texts=stage.takes_texts, counted=counted)


def _accumulate(
    session: Session,
    accelerator: Accelerator,
    items: Sequence[PreparedItem],
    stage: StageConfig,
    counts: Mapping[Key, int],
    *,
    answers: int,
) -> tuple[Accumulated, list[Losses]]:
    """Leave the gradients of this process's part of a batch; also returns what its micro-batches
    made, without graphs."""
    sequential = session.config.optim.readers == "sequential"
    made: list[Losses] = []

    def loss_fn(micro: Sequence[PreparedItem]) -> MicroLoss:
        if micro[0] is items[0]:  # also when the step starts again after running out of memory
            made.clear()
        with accelerator.autocast():
            losses = session.objectives.compute(
                micro,
                stage,
                counts,
                backward=accelerator.backward if sequential else None,
                answers=answers,
            )
        total, losses.total = losses.total, losses.total.detach()
        losses.terms = {}  # they would hold the graph
        made.append(losses)
        parts = {
            f"{LOSSES}/{objective}/{name}": value / max(1, counts[objective, name])
            for (objective, name), value in losses.sums.items()
        }
        parts |= {f"{measure}/{name}": v for (measure, name), v in losses.measures.items()}
        # `compute` has divided by the global counts: micro-batches simply add up.
        return MicroLoss(total, len(micro) / len(items), parts)

    result = run_accumulated(
        items,
        loss_fn=loss_fn,
        parameters=session.state.parameters,
        micro_batch=session.state.micro_batch,
        backward=_went_backward if sequential else partial(_backward, accelerator),
        divisor=lambda weight: 1.0,
    )
    return result, made


def _loss_norms(
    session: Session,
    accelerator: Accelerator,
    items: Sequence[PreparedItem],
    stage: StageConfig,
    counts: Mapping[Key, int],
) -> dict[str, float]:
    """The gradient norm of each loss where that is due: the main process measures it."""
    every, state = session.config.loss_norms_every, session.state
    if not (every and accelerator.is_main_process and passes(state.previous, state.step, every)):
        return {}
    return loss_gradient_norms(session, accelerator, items, stage, counts)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, those of all parts one behind the other."""
    names = {name for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts]) for name in sorted(names)}


def _backward(accelerator: Accelerator, total: Tensor) -> None:
    """Backward, unless all weights are 0 at this step: there is no graph then."""
    if total.requires_grad:
        accelerator.backward(total)


def _went_backward(total: Tensor) -> None:
    """A backward pass that does nothing: `compute` has gone backward reader by reader."""
