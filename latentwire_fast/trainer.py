"""The training loop: stages, accumulation, guards, checkpoints, logs. Resuming is bit-exact.

The batch of a step is a pure function of (seed, step), so a checkpoint holds weights, optimisers,
random state and little else. Several processes each take a slice of the global batch; gradients are
summed in one all-reduce of the (small) trained part, which leaves memory retries to each process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from latentwire_fast.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    parameter_digest,
    save_checkpoint,
)
from latentwire_fast.config import Mode, RunConfig, StageConfig, run_config_from_json, to_json
from latentwire_fast.data.sources import load_examples
from latentwire_fast.data.streams import ExampleStream, Stream, TestbedStream
from latentwire_fast.distributed import Reducer
from latentwire_fast.encoders import Encoder
from latentwire_fast.errors import CheckpointError, ConfigError, RunStopped
from latentwire_fast.guards import (
    FrozenGuard,
    MicroLoss,
    NonFiniteGuard,
    SpikeGuard,
    run_accumulated,
)
from latentwire_fast.interlingua import Interlingua, ReaderCard, build_encoder
from latentwire_fast.local_paths import absolute_paths
from latentwire_fast.objectives import Objectives, Work
from latentwire_fast.optim import build_optimizers, scale_learning_rates
from latentwire_fast.reader import Reader, load_readers
from latentwire_fast.run_state import (
    load_optimizer_state,
    optimizer_state,
    restore_rng_state,
    rng_state,
)
from latentwire_fast.schedules import facts_at, lr_factor
from latentwire_fast.signals import StopSignals
from latentwire_fast.storage import RunLock, publish_folder, write_atomically
from latentwire_fast.teacher import TeacherCache
from latentwire_fast.tracking import Tracker, latent_statistics, module_gradient_norms
from latentwire_fast.truncation import measure_truncation

logger = logging.getLogger(__name__)


def build_model(config: RunConfig, readers: dict[str, Reader]) -> Interlingua:
    """A fresh model for these readers."""
    return Interlingua(
        build_encoder(config.encoder, readers),
        {name: ReaderCard.of(reader) for name, reader in readers.items()},
        encoder_config=config.encoder,
        quantizer=config.quantizer,
        adapter=config.adapter,
        mode=config.mode,
    )


def build_stream(config: RunConfig, readers: dict[str, Reader]) -> Stream:
    """Training data; a finite set is checked for answers that tokenise differently after the
    anchor.

    Raises:
        ConfigError: prompt + answer would not tokenise to prompt ids + answer ids.
    """
    if config.data.source == "testbed":
        return TestbedStream(config.data, mode=config.mode, seed=config.seed)
    examples = load_examples(config.data.source, split="train", count=None, seed=config.seed)
    answers = sorted({e.answers[0] for e in examples if e.answers})
    for reader in readers.values():
        wrong = reader.prompts.check_alignment(answers)
        if wrong:
            raise ConfigError(
                f"{len(wrong)} of {len(answers)} answers of {config.data.source} tokenise "
                f"differently after the anchor {reader.prompts.anchor!r} for reader "
                f"{reader.name!r}, for example {wrong[0]!r}; choose an anchor that ends where a "
                "token ends"
            )
    return ExampleStream(examples, config.data, mode=config.mode, seed=config.seed)


def warn_of_truncation(encoder: Encoder, stream: Stream, mode: Mode) -> None:
    """Say once how much of a finite data set training will not see."""
    if isinstance(stream, ExampleStream):
        texts = ((item.context, turn.question) for item in stream.items for turn in item.turns)
        truncation = measure_truncation(encoder, texts, mode=mode)
        if truncation.cut:
            logger.warning("training data: %s. Raise that limit, or split the passages", truncation)


class Trainer:
    """One run in one folder.

    Args:
        config: the run; must equal the folder's own `config.json` when that exists. Its local
            paths are made absolute.
        run_dir: made if missing. An unfinished run there is resumed, a finished one is left alone.
        progress: show a progress bar.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, progress: bool = True) -> None:
        self.config = absolute_paths(config)
        self.run_dir = run_dir
        precision = config.optim.mixed_precision
        self.accelerator = Accelerator(mixed_precision=precision)
        self.reducer = Reducer(self.accelerator)
        self.progress = progress and self.accelerator.is_main_process
        self.signals = StopSignals()

    @property
    def model_dir(self) -> Path:
        """Where the trained model is saved; its presence marks the run as finished."""
        return self.run_dir / "model"

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
            self._check_config()
            if self.finished:
                logger.info("%s is trained already", self.run_dir)
                return
            self._setup()
            # Only now: a run that cannot start may be corrected and started in the same folder.
            if self.accelerator.is_main_process:
                text = json.dumps(to_json(self.config), indent=2) + "\n"
                write_atomically(self.run_dir / "config.json", text)
            with self.signals, self._tracker() as tracker:
                self._loop(tracker)
            self._finish()

    def _check_config(self) -> None:
        path = self.run_dir / "config.json"
        if path.exists():
            try:
                stored = json.loads(path.read_text())
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path} is not valid JSON: {error}") from None
            with contextlib.suppress(ConfigError):  # another version's is compared as it is
                stored = to_json(absolute_paths(run_config_from_json(stored)))
            wanted = to_json(self.config)
            stored = stored if isinstance(stored, dict) else {}
            differ = sorted(k for k in wanted | stored if stored.get(k) != wanted.get(k))
            if differ:
                raise ConfigError(
                    f"{path} is of a run with another configuration (differs in "
                    f"{', '.join(differ)}); choose another --run folder, or remove this one"
                )
        self.accelerator.wait_for_everyone()

    def _setup(self) -> None:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)  # python's, numpy's and torch's generators: libraries draw from all
        device = self.accelerator.device
        self.readers = load_readers(config.readers, device)
        self.frozen = FrozenGuard({name: r.model for name, r in self.readers.items()})
        self.model = build_model(config, self.readers).to(device).train()
        if config.optim.gradient_checkpointing:
            for reader in self.readers.values():
                reader.enable_gradient_checkpointing()
        self.named = self.model.trained_parameters()
        self.parameters = [p for _, p in self.named]
        self.optimizers = build_optimizers(
            self.named,
            muon_lr=config.optim.muon_lr,
            adamw_lr=config.optim.adamw_lr,
            weight_decay=config.optim.weight_decay,
            lr_scale=lambda name: (
                config.optim.encoder_lr if name.startswith("encoder.core.") else 1.0
            ),
        )
        teacher = None
        if any(stage.kd for stage in config.stages) and config.data.source != "testbed":
            rank = self.accelerator.process_index
            teacher = TeacherCache(self.run_dir / "teacher", rank=rank)
        self.objectives = Objectives(self.model, self.readers, teacher=teacher)
        self.stream = build_stream(config, self.readers)
        if self.accelerator.is_main_process:
            warn_of_truncation(self.model.encoder, self.stream, config.mode)
        self.nonfinite = NonFiniteGuard(self.run_dir)
        self.spikes = SpikeGuard()
        self.step = 0
        self.seconds = 0.0
        self.micro_batch = config.optim.micro_batch or config.optim.batch_size
        if self.accelerator.process_index:
            # The weights above are drawn alike everywhere, the dropout of the steps is not.
            set_seed(config.seed, device_specific=True)
        self._restore()

    def _restore(self) -> None:
        path = latest_checkpoint(self.run_dir / "checkpoints")
        if path is None:
            return
        checkpoint = load_checkpoint(path)
        digest = parameter_digest(checkpoint.tensors["model"].items())
        if digest != checkpoint.state["model_digest"]:
            raise CheckpointError(f"{path}: the model's weights do not match their digest")
        self.model.load_state_dict(checkpoint.tensors["model"])
        load_optimizer_state(
            self.optimizers,
            self.named,
            tensors=checkpoint.tensors["optimizer"],
            state=checkpoint.state["optimizer"],
        )
        self._restore_rng(checkpoint)
        self.spikes.state = checkpoint.state["spikes"]
        self.seconds = checkpoint.state["seconds"]
        self.micro_batch = checkpoint.state["micro_batch"]
        self.step = checkpoint.step
        logger.info("resumed %s at step %d", self.run_dir, self.step)

    def _restore_rng(self, checkpoint: Checkpoint) -> None:
        """This process's own random state; another number of processes than saved is a warning."""
        saved, rank = checkpoint.state["rng"], self.accelerator.process_index
        if len(saved) != self.accelerator.num_processes:
            logger.warning(
                "saved by %d processes, resumed by %d: random numbers (dropout) will differ",
                len(saved),
                self.accelerator.num_processes,
            )
        if rank < len(saved):
            tensors = checkpoint.tensors[f"rng.{rank}"]
            restore_rng_state({}, tensors=tensors, state=saved[rank])

    def save(self) -> None:
        """Write a checkpoint of the current step: called by every process, done by the main one."""
        rng = self.reducer.each(rng_state({}))
        if not self.accelerator.is_main_process:
            return
        model = self.model.trained_state()
        optimizer_tensors, optimizer_json = optimizer_state(self.optimizers, self.named)
        save_checkpoint(
            self.run_dir / "checkpoints",
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
                "seconds": self.seconds,
                "micro_batch": self.micro_batch,
                "model_digest": parameter_digest(model.items()),
                "trained_parameters": sum(p.numel() for p in self.parameters),
                "readers": {name: r.fingerprint for name, r in self.readers.items()},
            },
        )

    def _tracker(self) -> contextlib.AbstractContextManager[Tracker | None]:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return Tracker(self.run_dir, resume_step=self.step - 1 if self.step else None)

    def _loop(self, tracker: Tracker | None) -> None:
        config = self.config
        bar = tqdm(
            total=config.total_steps,
            initial=self.step,
            disable=not self.progress,
            desc=f"train {config.preset}",
            unit="step",
            dynamic_ncols=True,
        )
        with bar:
            while self.step < config.total_steps:
                record = self._train_step()
                self.step += 1
                bar.update()
                if record is not None:
                    if tracker is not None:
                        tracker.log(record)
                    bar.set_postfix_str(_postfix(record))
                if self.reducer.any(self.signals.number is not None):
                    self._save_and_stop()
                if self.step % config.save_every == 0 or self.step == config.total_steps:
                    self.save()

    def _save_and_stop(self) -> None:
        self.save()
        self.accelerator.wait_for_everyone()  # a launcher ends the others once one has ended
        raise RunStopped(
            f"stopped by a signal after step {self.step} of {self.config.total_steps}; "
            "everything is saved. Run the same command to go on",
            status=128 + (self.signals.number or signal.SIGTERM),  # it may have come to another
        )

    def _active(self) -> list[str]:
        names = sorted(self.readers)
        if self.config.optim.readers == "alternate":
            return [names[self.step % len(names)]]
        return names

    def _train_step(self) -> dict[str, Any] | None:
        """One optimiser step; returns a diagnostics record on logged steps."""
        config, start = self.config, time.perf_counter()
        stage, share = config.stage_at(self.step)
        facts = facts_at(stage.facts, share, config.data.facts)
        items = self.stream.batch(self.step, config.optim.batch_size, facts=facts)
        world = self.accelerator.num_processes
        works = self.objectives.prepare(
            items[self.accelerator.process_index :: world], stage, self._active()
        )
        counts = self.reducer.counts(Objectives.counts(works))
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
            parameters=self.parameters,
            micro_batch=self.micro_batch,
            backward=self.accelerator.backward,
            divisor=lambda weight: 1.0,
        )
        self.micro_batch = result.micro_batch
        self.reducer.gradients(self.parameters)
        loss, parts = self.reducer.values(result.loss, result.parts)
        logged = self.step % config.log_every == 0 or self.step + 1 == config.total_steps
        norms = {}
        if logged:
            trained = {name: torch.nn.ModuleDict(self.model.parts(name)) for name in self.readers}
            norms = module_gradient_norms({"encoder": self.model.encoder, **trained})
        self.nonfinite.check(
            loss,
            step=self.step,
            named_parameters=self.named,
            example_ids=[item.id for item in items],
            losses=parts,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optim.clip)
        factor = lr_factor(config, self.step, stage)
        scale_learning_rates(self.optimizers, factor)
        if not self.spikes.should_skip(loss.item(), step=self.step):
            for optimizer in self.optimizers:
                optimizer.step()
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        if not logged:
            return None
        return self._record(
            stage, facts, loss, parts, norm, norms, factor, sum(counts.values()) / elapsed, latents
        )

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
        latents: list[Tensor],
    ) -> dict[str, Any]:
        latent = torch.cat(latents)
        accuracy = {
            k.split("/")[1]: v.item() for k, v in parts.items() if k.startswith("accuracy/")
        }
        return {
            "step": self.step,
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
            "seconds": self.seconds,
        }

    def _finish(self) -> None:
        self.frozen.verify()
        if not self.accelerator.is_main_process:
            return
        temporary = self.run_dir / "model.tmp"
        try:
            self.model.eval().save_pretrained(temporary)
            publish_folder(temporary, self.model_dir)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not save the model in {self.run_dir}: {error}; the training is in its last "
                "checkpoint. Make room or fix the folder's permissions, then run the same command"
            ) from error


def _postfix(record: dict[str, Any]) -> str:
    accuracy = " ".join(f"{name} {value:.2f}" for name, value in sorted(record["accuracy"].items()))
    return (
        f"{record['stage']} loss {record['loss']:.3f} acc {accuracy} "
        f"{record['tokens_per_second']:.0f} tok/s"
    )
