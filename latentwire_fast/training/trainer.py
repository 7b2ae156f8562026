"""The training loop: stages, accumulation, guards, checkpoints, logs. Resuming is bit-exact.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import CheckpointError, ConfigError, RunStopped
from latentwire_fast.files.atomic import publish_folder, write_atomically
from latentwire_fast.files.lock import RunLock
from latentwire_fast.objectives.objective_set import Key, Objectives, Work
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.training.accumulation import Accumulated, MicroLoss, run_accumulated
from latentwire_fast.training.builders import (
    build_model,
    build_stream,
    check_stored_config,
    warn_of_truncation,
)
from latentwire_fast.training.distributed import Reducer
from latentwire_fast.training.guards import FrozenGuard, NonFiniteGuard
from latentwire_fast.training.local_paths import absolute_paths
from latentwire_fast.training.optimizer_state import rng_state
from latentwire_fast.training.optimizers import build_optimizers, scale_learning_rates
from latentwire_fast.training.schedules import facts_at, lr_factor
from latentwire_fast.training.signals import StopSignals
from latentwire_fast.training.state import TrainingState
from latentwire_fast.training.tracking import Tracker, latent_statistics, module_gradient_norms

logger = logging.getLogger(__name__)


class Trainer:
    """One run in one folder.

    Args:
        config: the run; must equal the folder's own `config.json` when that exists. Its local
            paths are made absolute.
        run_dir: made if missing. An unfinished run there is resumed, a finished one is left alone.
        heldout: what it will be evaluated on; whether that can be is checked before the training.
        progress: show a progress bar.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        heldout: Sequence[Example] = (),
        progress: bool = True,
    ) -> None:
        self.config = absolute_paths(config)
        self.heldout = heldout
        self.run_dir = run_dir
        precision = config.optim.mixed_precision
        # Unless told, accelerate takes several processes on a CPU for one each.
        on_cpu = not torch.accelerator.is_available()
        self.accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
        self.reducer = Reducer(self.accelerator)
        self.progress = progress and self.accelerator.is_main_process
        self.signals = StopSignals()

    @property
    def model_dir(self) -> Path:
        """Where the trained model is saved; its presence marks the run as finished."""
        return self.run_dir / "model"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether training is complete and saved."""
        return (self.model_dir / "config.json").exists()

    def run(self) -> None:
        """Train to the end, or until asked to stop (SIGINT, SIGTERM): then save and raise.

        Raises:
            ConfigError: the folder holds a run with another configuration.
            RunStopped: by a signal, and saved; the same call goes on.
            TrainingError: non-finite values, a second writer, or readers that changed.
        """
        lock = (
            RunLock(self.run_dir) if self.accelerator.is_main_process else contextlib.nullcontext()
        )
        with lock:
            check_stored_config(self.run_dir / "config.json", self.config)
            self.accelerator.wait_for_everyone()
            if self.finished:
                logger.info("%s is trained already", self.run_dir)
            else:
                self._train()
            self._part()

    def _train(self) -> None:
        self._setup()
        # Only now: a run that cannot start may be corrected and started in the same folder.
        if self.accelerator.is_main_process:
            text = json.dumps(to_json(self.config), indent=2) + "\n"
            write_atomically(self.run_dir / "config.json", text)
        with self.signals, self._tracker() as tracker:
            self._loop(tracker)
        self._finish()

    def _part(self) -> None:
        """Leave the other processes together with them: a launcher ends those that are left when
        one has ended, and one that ends with its connections open may crash at that."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _setup(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        if config.optim.batch_size < processes:
            raise ConfigError(
                f"batch_size={config.optim.batch_size} leaves some of {processes} processes "
                f"without an example; set --batch-size to {processes} at least, or start fewer"
            )
        if config.threads:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)  # python's, numpy's and torch's generators: libraries draw from all
        device = self.accelerator.device
        self.readers = load_readers(config.readers, device)
        self.frozen = FrozenGuard({name: r.model for name, r in self.readers.items()})
        self.model = build_model(config, self.readers).to(device).train()
        if config.base:
            self.model.encoder.eval()
        if config.optim.gradient_checkpointing:
            for reader in self.readers.values():
                reader.enable_gradient_checkpointing()
        optimizers = build_optimizers(self.model, config.optim)
        teacher = None
        if any(stage.kd for stage in config.stages) and config.data.source != "testbed":
            rank = self.accelerator.process_index
            teacher = TeacherCache(self.run_dir / "teacher", rank=rank)
        self.objectives = Objectives(self.model, self.readers, teacher=teacher)
        self.stream = build_stream(config, self.readers)
        check_answers(self.heldout, self.readers, source=f"{config.data.source} (held out)")
        if self.accelerator.is_main_process:
            warn_of_truncation(self.model.encoder, self.stream, config.mode)
        self.nonfinite = NonFiniteGuard(self.run_dir)
        micro_batch = config.optim.micro_batch or config.optim.batch_size
        self.state = TrainingState(self.model, optimizers, micro_batch)
        if self.accelerator.process_index:
            # The weights above are drawn alike everywhere, the dropout of the steps is not.
            set_seed(config.seed, device_specific=True)
        if self.state.restore(
            self.checkpoints,
            rank=self.accelerator.process_index,
            processes=processes,
            data=self.stream.digest,
        ):
            logger.info("resumed %s at step %d", self.run_dir, self.state.step)

    def save(self) -> None:
        """Write a checkpoint of the current step: called by every process, done by the main one."""
        rng = self.reducer.each(rng_state({}))
        if self.accelerator.is_main_process:
            fingerprints = {name: reader.fingerprint for name, reader in self.readers.items()}
            self.state.save(
                self.checkpoints, rng=rng, readers=fingerprints, data=self.stream.digest
            )

    def _tracker(self) -> contextlib.AbstractContextManager[Tracker | None]:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return Tracker(self.run_dir, resume_step=self.state.step - 1 if self.state.step else None)

    def _loop(self, tracker: Tracker | None) -> None:
        config, state = self.config, self.state
        bar = tqdm(
            total=config.total_steps,
            initial=state.step,
            disable=not self.progress,
            desc=f"train {config.preset}",
            unit="step",
            dynamic_ncols=True,
        )
        with bar:
            while state.step < config.total_steps:
                record = self._train_step()
                state.step += 1
                bar.update()
                if record is not None:
                    if tracker is not None:
                        tracker.log(record)
                    bar.set_postfix_str(_postfix(record))
                if self.reducer.any(self.signals.number is not None):
                    self._save_and_stop()
                if state.step % config.save_every == 0 or state.step == config.total_steps:
                    self.save()

    def _save_and_stop(self) -> None:
        self.save()
        self._part()
        raise RunStopped(
            f"stopped by a signal after step {self.state.step} of {self.config.total_steps}; "
            "everything is saved. Run the same command to go on",
            status=128 + (self.signals.number or signal.SIGTERM),  # it may have come to another
        )

    def _active(self) -> list[str]:
        names = sorted(self.readers)
        if self.config.optim.readers == "alternate":
            return [names[self.state.step % len(names)]]
        return names

    def _train_step(self) -> dict[str, Any] | None:
        """One optimiser step; returns a diagnostics record on logged steps."""
        config, state, start = self.config, self.state, time.perf_counter()
        stage, share = config.stage_at(state.step)
        facts = facts_at(stage.facts, share, config.data.facts)
        items = self.stream.batch(state.step, config.optim.batch_size, facts=facts)
        world = self.accelerator.num_processes
        works = self.objectives.prepare(
            items[self.accelerator.process_index :: world], stage, self._active()
        )
        counts = self.reducer.counts(Objectives.counts(works))
        result, latent = self._accumulate(works, stage, counts)
        state.micro_batch = result.micro_batch
        self.reducer.gradients(state.parameters)
        loss, parts = self.reducer.values(result.loss, result.parts)
        logged = state.step % config.log_every == 0 or state.step + 1 == config.total_steps
        norms = {}
        if logged:
            trained = {name: torch.nn.ModuleDict(self.model.parts(name)) for name in self.readers}
            norms = module_gradient_norms({"encoder": self.model.encoder, **trained})
        self.nonfinite.check(
            loss,
            step=state.step,
            named_parameters=state.named,
            example_ids=[item.id for item in items],
            losses=parts,
        )
        norm = torch.nn.utils.clip_grad_norm_(state.parameters, config.optim.clip)
        factor = lr_factor(config, state.step, stage)
        scale_learning_rates(state.optimizers, factor)
        state.spikes.watch(loss.item(), step=state.step)
        for optimizer in state.optimizers:
            optimizer.step()
        elapsed = time.perf_counter() - start
        state.seconds += elapsed
        if not logged:
            return None
        # Of the objectives that predict tokens: `select` and `kv` count texts, `embed` embeddings.
        tokens = sum(n for key, n in counts.items() if key[0] not in ("select", "kv", "embed"))
        return self._record(
            stage, facts, loss, parts, norm, norms, factor, tokens / elapsed, latent
        )

    def _accumulate(
        self, works: Sequence[Work], stage: StageConfig, counts: Mapping[Key, int]
    ) -> tuple[Accumulated, Tensor]:
        """Leave the gradients of this process's part of a batch; also returns its latents."""
        latents: list[Tensor] = []

        def loss_fn(micro: Sequence[Work]) -> MicroLoss:
            if micro[0] is works[0]:  # also when the step starts again after running out of memory
                latents.clear()
            with self.accelerator.autocast():
                losses = self.objectives.compute(micro, stage, counts)
            latents.append(losses.latent_BMd)
            parts = {
                f"{k[0]}/{k[1]}": v.detach() / max(1, counts[k]) for k, v in losses.sums.items()
            }
            parts |= {
                f"accuracy/{name}": right / max(1, counts["answer", name])
                for name, right in losses.right.items()
            }
            # `compute` has divided by the global counts: micro-batches simply add up.
            return MicroLoss(losses.total, len(micro) / len(works), parts)

        result = run_accumulated(
            works,
            loss_fn=loss_fn,
            parameters=self.state.parameters,
            micro_batch=self.state.micro_batch,
            backward=self.accelerator.backward,
            divisor=lambda weight: 1.0,
        )
        return result, torch.cat(latents)

    def _record(
        self,
        stage: StageConfig,
        facts: int,
        loss: Tensor,
        parts: dict[str, Tensor],
        norm: Tensor,
        norms: dict[str, float],
        factor: float,
        tokens_per_second: float,
        latent: Tensor,
    ) -> dict[str, Any]:
        accuracy = {
            k.split("/")[1]: v.item() for k, v in parts.items() if k.startswith("accuracy/")
        }
        return {
            "step": self.state.step,
            "stage": stage.name,
            "facts": facts,
            "loss": loss.item(),
            "losses": {k: v.item() for k, v in parts.items() if not k.startswith("accuracy/")},
            "accuracy": accuracy,
            "lr": factor,
            "grad_norm": norm.item(),
            "grad_norms": norms,
            "latent": latent_statistics(latent),
            "rms": {name: self.model.prefix_rms(name, latent) for name in self.readers},
            "tokens_per_second": tokens_per_second,
            "seconds": self.state.seconds,
        }

    def _finish(self) -> None:
        self.frozen.verify()
        if not self.accelerator.is_main_process:
            return
        temporary = self.run_dir / "model.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a save that was cut short
            self.model.eval().save_pretrained(temporary)
            publish_folder(temporary, self.model_dir)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not save the model in {self.run_dir}: {error}; the training is in its last "
                "checkpoint. Make room or fix the folder's permissions, then run the same command"
            ) from error


def _postfix(record: dict[str, Any]) -> str:
    accuracy = "".join(f" {name} {value:.2f}" for name, value in sorted(record["accuracy"].items()))
    parts = [f"{record['stage']} loss {record['loss']:.3f}"]
    if accuracy:  # a stage without answers has none
        parts.append(f"acc{accuracy}")
    if record["tokens_per_second"]:
        parts.append(f"{record['tokens_per_second']:.0f} tok/s")
    return " ".join(parts)
