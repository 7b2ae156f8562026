"""The objects of a training run, built once from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import ExampleStream, Stream
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.training.builders import build_model, build_stream, warn_of_truncation
from latentwire_fast.training.frozen_work import keeps
from latentwire_fast.training.guards import FrozenGuard, NonFiniteGuard
from latentwire_fast.training.optimizers import build_optimizers
from latentwire_fast.training.state import TrainingState

logger = logging.getLogger(__name__)

START_TEXTS = 8  # training texts that a fresh model may start from


@dataclass(frozen=True)
class Session:
    """One run in memory, at the step that it is to go on from.

    Attributes:
        readers: frozen, by name.
        model: what is trained.
        objectives: what it is trained on.
        stream: where batches come from.
        state: all that changes from step to step.
        frozen: shows that the readers did not change. nonfinite: stops at a NaN or an infinity.
    """

    config: RunConfig
    folder: RunFolder
    readers: dict[str, Reader]
    model: Interlingua
    objectives: ObjectiveSet
    stream: Stream
    state: TrainingState
    frozen: FrozenGuard
    nonfinite: NonFiniteGuard

    def active_readers(self) -> list[str]:
        """The readers that the next step trains, in the order of their names."""
        names = sorted(self.readers)
        if self.config.optim.readers == "alternate":
            return [names[self.state.step % len(names)]]
        return names


def open_session(
    config: RunConfig,
    folder: RunFolder,
    *,
    accelerator: Accelerator,
    heldout: Sequence[Example] = (),
    cache: bool = True,
) -> Session:
    """Load and build all that a run needs, and go back to its newest checkpoint if it has one.

    Args:
        heldout: what it will be evaluated on; whether that can be is checked.
        cache: keep frozen work of a finite data set on disk.

    Raises:
        ConfigError, DataError: the configuration cannot work, or not with its readers and data.
        CheckpointError: all checkpoints are damaged, or of another run or other data.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    smallest = min(stage.batch_size or config.optim.batch_size for stage in config.stages)
    if smallest < processes:
        raise ConfigError(
            f"batch_size={smallest} leaves some of {processes} processes "
            f"without an example; set --batch-size to {processes} at least, or start fewer"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)  # python's, numpy's and torch's generators: libraries draw from all
    readers = load_readers(config.readers, accelerator.device)
    frozen = FrozenGuard({name: reader.model for name, reader in readers.items()})
    stream = build_stream(config, readers)
    first = stream.batch(0, START_TEXTS, facts=config.data.facts)
    contexts = [item.context for item in first]
    model = build_model(config, readers, contexts).to(accelerator.device).train()
    if config.base:
        model.encoder.eval()
    if config.optim.gradient_checkpointing:
        for reader in readers.values():
            reader.enable_gradient_checkpointing()
    optimizers = build_optimizers(model, config.optim)
    check_answers(heldout, readers, source=f"{config.data.source} (held out)")
    if accelerator.is_main_process:
        warn_of_truncation(model.encoder, stream, config.mode)
    objectives = ObjectiveSet(model, readers)
    # Where data has no end, no prompt comes twice.
    if cache and isinstance(stream, ExampleStream) and keeps(objectives, config, stream, folder):
        objectives.teacher = TeacherCache(folder.frozen_work, rank=rank)
        model.encoder.keep_states(folder.frozen_work, rank=rank)
    session = Session(
        config=config,
        folder=folder,
        readers=readers,
        model=model,
        objectives=objectives,
        stream=stream,
        state=TrainingState(model, optimizers, config.optim.micro_batch or config.optim.batch_size),
        frozen=frozen,
        nonfinite=NonFiniteGuard(folder.nonfinite),
    )
    if rank:
        # The weights above are drawn alike everywhere, the dropout of the steps is not.
        set_seed(config.seed, device_specific=True)
    if session.state.restore(
        folder.checkpoints, rank=rank, processes=processes, data=stream.digest
    ):
        logger.info("resumed %s at step %d", folder.path, session.state.step)
    return session
