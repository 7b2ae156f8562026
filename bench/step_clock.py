"""A clock in the trainer's own training step: it says which part each moment belongs to.

`TimedTrainer` is the trainer, whose modules, optimisers and data have hooks that turn the clock's
hand. A forward pass is between the two hooks of its module. The backward pass goes through the same
modules in reverse: a module's share begins when the gradient of its output arrives, and ends when
that of another module's output does.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast.training.tracking import Tracker
from latentwire_fast.training.trainer import Trainer

OTHER = "guards, clipping, other"
LOGGING = "logging"


class StepClock:
    """Seconds by part, step by step. Parts may lie within others, whose time they interrupt."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, bool, Counter[str]]] = []  # stage, logged or not, seconds
        self._seconds: Counter[str] = Counter()
        self._stack: list[str] = []
        self._since = 0.0

    def enter(self, part: str) -> None:
        """A part begins within the present one."""
        self._charge()
        self._stack.append(part)

    def leave(self) -> None:
        """The present part ends."""
        self._charge()
        self._stack.pop()

    def turn(self, part: str) -> None:
        """Charge the time so far to the present part, and go over to another."""
        self._charge()
        self._stack[-1] = part

    def begin_step(self) -> None:
        """A step begins. It lasts until `end_step`, whatever is called in between."""
        self._seconds, self._stack = Counter(), [OTHER]
        self._since = _now()

    def end_step(self, stage: str, *, logged: bool) -> None:
        """The step that began last is over."""
        self._charge()
        self.steps.append((stage, logged, self._seconds))

    def _charge(self) -> None:
        now = _now()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls belong to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def medians(self, stage: str, *, skip: int, log_every: int) -> dict[str, dict[str, float]]:
        """Median milliseconds and share of a step by part, the largest first.

        A logged step takes longer in the rest of the step: that is the part "logging", spread
        over the `log_every` steps between two logged ones.

        Args:
            skip: the first steps of the stage, which are left out.
        """
        steps = [(logged, seconds) for name, logged, seconds in self.steps if name == stage][skip:]
        quiet = [seconds for logged, seconds in steps if not logged]
        loud = [seconds for logged, seconds in steps if logged]
        names = {name for _, seconds in steps for name in seconds}
        found = {name: _median(name, [seconds for _, seconds in steps]) for name in names}
        found[LOGGING] = 0.0
        if quiet and loud:
            found[OTHER] = _median(OTHER, quiet)
            found[LOGGING] = max(0.0, _median(OTHER, loud) - found[OTHER]) / log_every
        total = sum(found.values())
        return {
            name: {"ms": 1e3 * seconds, "share": seconds / total}
            for name, seconds in sorted(found.items(), key=lambda item: -item[1])
        }


def _median(part: str, steps: list[Counter[str]]) -> float:
    return statistics.median(seconds[part] for seconds in steps)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class TimedTrainer(Trainer):
    """The trainer with a clock in its step.

    Args:
        batches: give only the first so many batches of each stage, again and again.
    """

    def __init__(self, *args: Any, batches: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches = batches
        self.clock = StepClock()
        self._stage: tuple[str, bool] | None = None  # of the step that runs: its name; logged

    def _loop(self, tracker: Tracker | None) -> None:
        if self._batches is not None:
            batch, count = self.session.stream.batch, self._batches
            self.session.stream.batch = lambda step, *args, **kwargs: batch(  # type: ignore[method-assign]
                step % count, *args, **kwargs
            )
        listen(self, self.clock)
        super()._loop(tracker)

    def _train_step(self) -> dict[str, Any] | None:
        self._end_step()
        stage, _ = self.config.stage_at(self.session.state.step)
        self.clock.begin_step()
        record = super()._train_step()
        self._stage = stage.name, record is not None
        return record

    def save(self) -> None:
        self._end_step()
        super().save()

    def _end_step(self) -> None:
        """End a step; the work right after it, such as writing its record, counts as part of it."""
        if self._stage is not None:
            stage, logged = self._stage
            self.clock.end_step(stage, logged=logged)
        self._stage = None


def listen(trainer: Trainer, clock: StepClock) -> None:
    """Hook a clock into everything that a trainer has set up for its steps."""
    session, accelerator = trainer.session, trainer.accelerator
    model = session.model
    replace = {
        (session.stream, "batch"): "data",
        (session.objectives, "prepare"): "prompts",
        (session.objectives, "compute"): "losses",
        (accelerator, "backward"): "losses backward",
    }
    for (owner, name), part in replace.items():
        setattr(owner, name, clock.wrap(part, getattr(owner, name)))
    for name in ("encode", "select"):
        setattr(model, name, _encoder(clock, getattr(model, name)))
    for name, reader in session.readers.items():
        for module in (reader.backbone, reader.head):
            _module(clock, module, name, targets=f"{name} targets")
        for module in model.parts(name).values():
            _module(clock, module, "adapters", targets=None)
    for optimizer in session.state.optimizers:
        part = f"optimiser {type(optimizer).__name__}"
        optimizer.register_step_pre_hook(lambda *_, part=part: clock.enter(part))
        optimizer.register_step_post_hook(lambda *_: clock.leave())


def _encoder(clock: StepClock, encode: Callable[..., Any]) -> Callable[..., Any]:
    """One of the model's two ways to encode, which are no modules of their own."""
    timed = clock.wrap("encoder forward", encode)

    def encoded(*args: Any, **kwargs: Any) -> Any:
        output = timed(*args, **kwargs)
        _on_gradient(clock, output, "encoder backward")
        return output

    return encoded


def _module(clock: StepClock, module: nn.Module, name: str, *, targets: str | None) -> None:
    """A module's passes. Those without gradients belong to `targets`: a reader's, of the text that
    is a target. Without a name for them they are not counted apart (an adapter's, for the log)."""

    def part() -> str | None:
        return f"{name} forward" if torch.is_grad_enabled() else targets

    def before(*_: Any) -> None:
        label = part()
        if label is not None:
            clock.enter(label)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if part() is not None:
            clock.leave()
            _on_gradient(clock, output, f"{name} backward")

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _on_gradient(clock: StepClock, output: Any, part: str) -> None:
    """Turn to a part when the gradient of one of its outputs arrives."""
    values = output.values() if isinstance(output, Mapping) else output
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda _gradient: clock.turn(part))
