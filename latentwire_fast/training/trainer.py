"""The training loop: one run in one folder, resumed bit-exactly.

The batch of a step is a pure function of (seed, step), so a checkpoint holds weights, optimisers,
random state and little else. Several processes each take a slice of the global batch; gradients are
summed in one all-reduce of the (small) trained part, which leaves memory retries to each process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import CheckpointError, RunStopped
from latentwire_fast.files.atomic import replace_folder, write_atomically
from latentwire_fast.files.lock import RunLock
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.ops.bf16 import is_fast_at_bf16
from latentwire_fast.training.boards import check_trackers
from latentwire_fast.training.builders import absolute_paths, check_stored_config
from latentwire_fast.training.distributed import Reducer
from latentwire_fast.training.optimizer_state import rng_state
from latentwire_fast.training.session import Session, open_session
from latentwire_fast.training.signals import StopSignals
from latentwire_fast.training.step import is_logged, train_step
from latentwire_fast.training.time_limit import next_step, passes
from latentwire_fast.training.tracking import Tracker

logger = logging.getLogger(__name__)


class Trainer:
    """One run in one folder.

    Args:
        config: the run; must equal the folder's own `config.json` when that exists. Its local
            paths are made absolute.
        run_dir: made if missing. An unfinished run there is resumed, a finished one is left alone.
        heldout: what it will be evaluated on; whether that can be is checked before the training.
        progress: show a progress bar.
        cache: keep what frozen models compute of a finite data set in the run folder; False also
            removes what an earlier call kept there.
        device: where to train; what accelerate chooses unless given.

    Attributes:
        folder: the paths of the run.
        folder_kind: the class that names them.
    """

    folder_kind: ClassVar[type[RunFolder]] = RunFolder

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        heldout: Sequence[Example] = (),
        progress: bool = True,
        cache: bool = True,
        device: torch.device | None = None,
    ) -> None:
        check_trackers(config.trackers)
        self.config = absolute_paths(config)
        self.heldout = heldout
        self.cache = cache
        self.folder = self.folder_kind(run_dir)
        precision = config.optim.mixed_precision
        # Unless told, accelerate takes several processes on a CPU for one each.
        on_cpu = not torch.accelerator.is_available() or (device and device.type == "cpu")
        if device and device.index is not None and device.type != "cpu":
            torch.accelerator.set_device_index(device.index)  # accelerate takes the current one
        if on_cpu and precision == "bf16" and not is_fast_at_bf16("cpu"):
            precision = "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=bool(on_cpu))
        self.reducer = Reducer(self.accelerator)
        self.progress = progress and self.accelerator.is_main_process
        self.signals = StopSignals()
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The run's objects in memory, from the start of its training on."""
        assert self._session is not None, "the training has not begun"
        return self._session

    @property
    def finished(self) -> bool:
        """Whether training is complete and its model saved."""
        return self.folder.is_trained

    def run(self) -> None:
        """Train to the end, or until asked to stop (SIGINT, SIGTERM): then save and raise.

        Raises:
            ConfigError: the folder holds a run with another configuration.
            RunStopped: by a signal, and saved; the same call goes on.
            TrainingError: non-finite values, a second writer, or readers that changed.
        """
        leads = self.accelerator.is_main_process
        with RunLock(self.folder.path) if leads else contextlib.nullcontext():
            check_stored_config(self.folder.config, self.config)
            self.accelerator.wait_for_everyone()
            if self.finished:
                logger.info("%s is trained already", self.folder.path)
            else:
                self._train()
            self._leave_together()

    def _train(self) -> None:
        if not self.cache and self.accelerator.is_main_process:
            shutil.rmtree(self.folder.frozen_work, ignore_errors=True)
        self._session = self._open()
        # Only now: a run that cannot start may be corrected and started in the same folder.
        if self.accelerator.is_main_process:
            text = json.dumps(to_json(self.config), indent=2) + "\n"
            write_atomically(self.folder.config, text)
        with self.signals, self._tracker() as tracker:
            self._loop(tracker)
        self._finish()

    def _open(self) -> Session:
        return open_session(
            self.config,
            self.folder,
            accelerator=self.accelerator,
            heldout=self.heldout,
            cache=self.cache,
        )

    def _leave_together(self) -> None:
        """Leave the other processes together with them: a launcher ends those that are left when
        one has ended, and one that ends with its connections open may crash at that."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def save(self) -> None:
        """Write a checkpoint of the current step: called by every process, done by the main one."""
        session, rng = self.session, self.reducer.each(rng_state({}))
        if self.accelerator.is_main_process:
            session.state.save(
                self.folder.checkpoints,
                rng=rng,
                readers={name: reader.fingerprint for name, reader in session.readers.items()},
                data=session.stream.digest,
            )

    def _tracker(self) -> contextlib.AbstractContextManager[Tracker | None]:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        step = self.session.state.step
        return Tracker(
            self.folder,
            resume_step=step - 1 if step else None,
            trackers=self.config.trackers,
            config=to_json(self.config),
        )

    def _loop(self, tracker: Tracker | None) -> None:
        total = self.session.config.total_steps
        bar = tqdm(
            total=total,
            initial=self.session.state.step,
            disable=not self.progress,
            desc=f"train {self.config.preset}",
            unit="step",
            dynamic_ncols=True,
        )
        with bar:
            self._validate(tracker)  # one that a signal cut short
            while self.session.state.step < total and not self._has_stalled():
                self._hand_over()
                self._advance(bar, tracker)
            self._hand_over()  # where a limit of time has left out the last stage

    def _advance(self, bar: tqdm[Any], tracker: Tracker | None) -> None:
        """One step, and what is due behind it."""
        config, state = self.session.config, self.session.state
        record = self._train_step()
        following = self._next_step()
        state.previous, state.step = state.step, following
        bar.update(state.step - state.previous)
        if record is not None:
            if tracker is not None:
                tracker.log(record)
            bar.set_postfix_str(_postfix(record))
        self._validate(tracker)
        if self.reducer.any(self.signals.number is not None):
            self._save_and_stop()
        is_last = state.step == config.total_steps or self._has_stalled()
        if is_last or passes(state.previous, state.step, config.save_every):
            self.save()

    def _hand_over(self) -> None:
        """Go on as a model with fewer latents, if the next step is for one: save, and open again
        as a run that was stopped there does."""
        if not self.session.must_hand_over:
            return
        self.save()
        self.session.frozen.verify()
        self._session = None  # its readers go before they are loaded again
        self.accelerator.wait_for_everyone()
        self._session = self._open()

    def _next_step(self) -> int:
        """The step behind the one that was done: as the main process's clock says, for all."""
        config, state = self.session.config, self.session.state
        if config.minutes is None:
            return state.step + 1
        return self.reducer.each(next_step(config, state.step, state.seconds, state.pace))[0]

    def _train_step(self) -> dict[str, Any] | None:
        """One optimiser step; returns its record on logged steps."""
        is_due = is_logged(self.session.config, self.session.state)
        result = train_step(self.session, self.accelerator, self.reducer)
        return result.record(self.session) if is_due else None

    def _validate(self, tracker: Tracker | None) -> None:
        """Score the model where that is due and not done; keep the best model so far."""
        session = self.session
        state, validator = session.state, session.validator
        is_last = state.step == self.session.config.total_steps
        if validator is None or not validator.is_due(
            state.step, state.validations, last=is_last, previous=state.previous
        ):
            return
        start = time.perf_counter()
        scores = validator.run(self.reducer, is_stopped=lambda: self.signals.number is not None)
        elapsed = time.perf_counter() - start
        state.seconds += elapsed
        state.pace.beside += elapsed
        if scores is None:  # a signal came: it is done when the run goes on
            return
        found = validator.judge(state.step, scores, state.validations)
        state.validations.append(found)
        if self.accelerator.is_main_process:
            if validator.best(state.validations) is found:
                places = self.folder.unfinished_best_model, self.folder.best_model
                self._save_model(*places, session.save)
            text = json.dumps(validator.summary(state.validations), indent=2) + "\n"
            write_atomically(self.folder.validation, text)
            if tracker is not None:
                tracker.mirror("validation", found["scores"], step=state.step)

    def _has_stalled(self) -> bool:
        """Whether the validations say that going on is of no use."""
        validator = self.session.validator
        return validator is not None and validator.has_stalled(self.session.state.validations)

    def _save_and_stop(self) -> None:
        self.save()
        self._leave_together()
        step, total = self.session.state.step, self.session.config.total_steps
        raise RunStopped(
            f"stopped by a signal after step {step} of {total}; everything is saved. Run the same "
            "command to go on",
            status=128 + (self.signals.number or signal.SIGTERM),  # it may have come to another
        )

    def _finish(self) -> None:
        self.session.frozen.verify()
        if not self.accelerator.is_main_process:
            return
        self.session.state.model.eval()  # as whoever goes on with it expects
        validation = self.config.validation
        best = self.folder.best_model if validation and validation.use_best else None
        write = partial(self.session.save_final, best=best)
        self._save_model(self.folder.unfinished_model, self.folder.model, write)

    def _save_model(self, temporary: Path, final: Path, write: Callable[[Path], None]) -> None:
        """Have a model written to a folder that is there as a whole or not at all."""
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a save that was cut short
            write(temporary)
            replace_folder(temporary, final)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not save the model in {self.folder.path}: {error}; the training is in its "
                "last checkpoint. Make room or fix the folder's permissions, then run the same "
                "command"
            ) from error


def _postfix(record: dict[str, Any]) -> str:
    accuracy = "".join(f" {name} {value:.2f}" for name, value in sorted(record["accuracy"].items()))
    parts = [f"{record['stage']} loss {record['loss']:.3f}"]
    if accuracy:  # a stage without answers has none
        parts.append(f"acc{accuracy}")
    if record["tokens_per_second"]:
        parts.append(f"{record['tokens_per_second']:.0f} tok/s")
    return " ".join(parts)
