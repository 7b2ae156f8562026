"""The objects of a training run, built once from its configuration."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import ExampleStream, Stream, TrainItem
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.spread import latent_statistics
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.objectives.text_answers import TextAnswers
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.training.bottleneck_fit import fit_bottleneck
from latentwire_fast.training.builders import (
    RunData,
    build_data,
    build_model,
    warn_of_truncation,
)
from latentwire_fast.training.checkpoint import has_checkpoint
from latentwire_fast.training.epochs import with_steps
from latentwire_fast.training.frozen_parts import check_frozen, is_within
from latentwire_fast.training.frozen_work import keeps
from latentwire_fast.training.guards import FrozenGuard, NonFiniteGuard
from latentwire_fast.training.hand_over import check_hand_overs, of_newest_step, wanted_latents
from latentwire_fast.training.optimizers import build_optimizers
from latentwire_fast.training.position_check import check_positions
from latentwire_fast.training.state import TrainingState
from latentwire_fast.training.validation import Validator, ask_latents, validator_of

logger = logging.getLogger(__name__)

FIRST_TOKENS = 5  # of the answers' predicted first tokens, so many are in a record
START_TEXTS = 8  # training texts that a fresh model may start from


@dataclass(frozen=True)
class Session:
    """One run in memory, at the step that it is to go on from.

    Attributes:
        readers: frozen, by name.
        objectives: what is trained on.
        config: of the run, with the steps of stages in epochs.
        data: where batches come from.
        state: all that changes from step to step.
        validator: scores the model while it trains, if the run wants that.
        frozen: shows that the readers did not change. nonfinite: stops at a NaN or an infinity.
    """

    config: RunConfig
    folder: RunFolder
    readers: dict[str, Reader]
    objectives: ObjectiveSet | TextAnswers
    data: RunData
    state: TrainingState
    frozen: FrozenGuard
    nonfinite: NonFiniteGuard
    validator: Validator | None

    @property
    def stream(self) -> Stream:
        """Where the batches of stages without a source of their own come from."""
        return self.data.stream

    def active_readers(self) -> list[str]:
        """The readers that the next step trains, in the order of their names."""
        stage, _ = self.config.stage_at(self.state.step)
        names = sorted(stage.readers or self.readers)
        if self.config.optim.readers == "alternate":
            return [names[self.state.step % len(names)]]
        return names

    def held(self, stage: StageConfig) -> list[nn.Parameter]:
        """The trained parameters that a stage leaves as they are."""
        return [p for name, p in self.state.named if is_within(name, stage.frozen)]

    def parts(self) -> dict[str, nn.Module]:
        """The trained parts by name, for the log of their gradients."""
        raise NotImplementedError

    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """What a step's record says of the latents of its items."""
        return {}

    def describe_first_tokens(self, ids: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a step's record says of the answers' most probable first tokens: the commonest of
        them with their numbers, and the share of the commonest, by reader."""
        commonest = {
            name: Counter(ids_N.tolist()).most_common(FIRST_TOKENS) for name, ids_N in ids.items()
        }
        if not commonest:
            return {}
        return {
            "first_tokens": {
                name: [[self.readers[name].tokenizer.decode([i]), count] for i, count in found]
                for name, found in commonest.items()
            },
            "first_token_share": {
                name: found[0][1] / len(ids[name]) for name, found in commonest.items()
            },
        }

    def after_step(self, stage: StageConfig, latents: Sequence[Tensor]) -> None:
        """What a step changes beside what the optimisers do.

        Args:
            latents: `[B, M, d]` of each process's items, in the order of the processes.
        """

    @property
    def wants_latents(self) -> bool:
        """Whether `after_step` does something with them."""
        return False

    @property
    def must_hand_over(self) -> bool:
        """Whether the next step is for another model, with fewer latents."""
        return False

    def save(self, folder: Path) -> None:
        """Write what was trained."""
        raise NotImplementedError

    def save_final(self, folder: Path, *, best: Path | None) -> None:
        """Write what was trained for the last time.

        Args:
            best: the saved model to take, in the place of the one in memory.
        """
        if best is None:
            self.save(folder)
        else:
            shutil.copytree(best, folder)


@dataclass(frozen=True)
class LatentSession(Session):
    """A run that trains latents.

    Attributes:
        model: what is trained.
    """

    model: Interlingua

    def parts(self) -> dict[str, nn.Module]:
        """The encoder, and for each reader what makes latents of use to it."""
        found: dict[str, nn.Module] = {"encoder": self.model.encoder}
        for name in self.readers:
            lora = self.model.lora_of(name)
            parts = [*self.model.parts(name).values(), *([] if lora is None else [lora])]
            found[name] = nn.ModuleList(parts)
        if any(p.requires_grad for p in self.model.bottleneck.parameters()):
            found["bottleneck"] = self.model.bottleneck
        return found

    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """Whether they differ, and the sizes of what readers are given of them."""
        rms = {name: self.model.prefix_rms(name, latent_BMd) for name in self.readers}
        codes = self.model.bottleneck.describe(latent_BMd)
        shown = {"codes": codes} if codes else {}
        return {"latent": latent_statistics(latent_BMd), "rms": rms, **shown}

    @property
    def wants_latents(self) -> bool:
        """Whether the bottleneck learns from them."""
        return self.model.bottleneck.learns and self.config.base is None

    def after_step(self, stage: StageConfig, latents: Sequence[Tensor]) -> None:
        """Show the bottleneck what was sent, unless the stage leaves it as it is."""
        if stage.quantize is not None and not is_within("bottleneck", stage.frozen):
            device = next(self.model.parameters()).device
            sent_BMd = torch.cat([latent_BMd.to(device) for latent_BMd in latents])
            self.model.bottleneck.learn(sent_BMd, stage.quantize)

    @property
    def must_hand_over(self) -> bool:
        """Whether the next step's stage has fewer latents than the model."""
        return self.model.encoder_config.latents != wanted_latents(self.config, self.state.step)

    def save(self, folder: Path) -> None:
        """Write the model."""
        self.model.save_pretrained(folder)

    def save_final(self, folder: Path, *, best: Path | None) -> None:
        """Write the model, its bottleneck fitted to the training texts."""
        if not self.model.bottleneck.fits_texts or self.config.base is not None:
            super().save_final(folder, best=best)
            return
        device = next(self.model.parameters()).device
        model = self.model if best is None else Interlingua.from_pretrained(best).to(device)
        fit_bottleneck(model, self.stream, self.config)
        model.save_pretrained(folder)


def begin(config: RunConfig, accelerator: Accelerator) -> None:
    """Set threads and seeds, before anything of a run is built.

    Raises:
        ConfigError: more processes than examples in a batch.
    """
    processes = accelerator.num_processes
    smallest = min(stage.batch_size or config.optim.batch_size for stage in config.stages)
    if smallest < processes:
        raise ConfigError(
            f"batch_size={smallest} leaves some of {processes} processes "
            f"without an example; set --batch-size to {processes} at least, or start fewer"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)  # python's, numpy's and torch's generators: libraries draw from all


def open_session(
    config: RunConfig,
    folder: RunFolder,
    *,
    accelerator: Accelerator,
    heldout: Sequence[Example] = (),
    cache: bool = True,
) -> LatentSession:
    """Load and build all that a run needs, and go back to its newest checkpoint if it has one.

    Args:
        heldout: what it will be evaluated on; whether that can be is checked.
        cache: keep frozen work of a finite data set on disk.

    Raises:
        ConfigError, DataError: the configuration cannot work, or not with its readers and data.
        CheckpointError: all checkpoints are damaged, or of another run or other data.
    """
    begin(config, accelerator)
    readers = load_readers(config.readers, accelerator.device)
    frozen = FrozenGuard({name: reader.model for name, reader in readers.items()})
    data = build_data(config, readers)
    config, stream = with_steps(config, data), data.stream
    contexts = _start_texts(config, stream)
    now = of_newest_step(config, folder.checkpoints)
    # A checkpoint holds what the encoder was fitted to.
    fitted = [] if has_checkpoint(folder.checkpoints) else _texts_to_fit(config, stream)
    model = build_model(now, readers, contexts, fitted).to(accelerator.device).train()
    if now is not config:
        check_hand_overs(config, model, partial(build_model, readers=readers, contexts=contexts))
    if config.base:
        model.encoder.eval()
        model.bottleneck.eval()
    if config.optim.gradient_checkpointing:
        for reader in readers.values():
            reader.enable_gradient_checkpointing()
    check_frozen(config.stages, [name for name, _ in model.trained_parameters()])
    optimizers = build_optimizers(model, config.optim)
    check_answers(heldout, readers, source=f"{config.data.source} (held out)")
    if accelerator.is_main_process and config.data.chunk_length is None:
        warn_of_truncation(model.encoder, stream, config.mode)
    objectives = ObjectiveSet(model, readers, chunk_length=config.data.chunk_length)
    # Where data has no end, no prompt comes twice.
    if cache and isinstance(stream, ExampleStream) and keeps(objectives, config, stream, folder):
        rank = accelerator.process_index
        objectives.teacher = TeacherCache(folder.frozen_work, rank=rank)
        model.encoder.keep_states(folder.frozen_work, rank=rank)
    check_positions(config, objectives, stream, heldout=heldout)
    session = LatentSession(
        config=config,
        folder=folder,
        readers=readers,
        model=model,
        objectives=objectives,
        data=data,
        state=TrainingState(model, optimizers, config.optim.micro_batch or config.optim.batch_size),
        frozen=frozen,
        nonfinite=NonFiniteGuard(folder.nonfinite),
        validator=validator_of(
            config,
            data.validation,
            partial(
                ask_latents, model=model, readers=readers, chunk_length=config.data.chunk_length
            ),
            modules=[model],
        ),
    )
    go_on(session, accelerator)
    return session


def _start_texts(config: RunConfig, stream: Stream) -> list[str]:
    """The first texts of the training data, if an attachment starts from some."""
    if not any(attachment.starts_from_texts for attachment in config.attachments):
        return []
    return [item.context for item in stream.batch(0, START_TEXTS, facts=config.data.facts)]


def _texts_to_fit(config: RunConfig, stream: Stream) -> list[TrainItem]:
    """The first items of the training data, each context or question once, if the encoder is fitted
    to some."""
    count = config.encoder.texts_to_fit
    if not count or config.base is not None:
        return []
    has_texts_only = isinstance(stream, ExampleStream) and not stream.items
    items = stream.batch(0, count, facts=config.data.facts, texts=has_texts_only)
    asked = config.mode == "pure"
    return list({(item.context, item.question if asked else ""): item for item in items}.values())


def go_on(session: Session, accelerator: Accelerator) -> None:
    """Go back to a run's newest checkpoint, if it has one.

    Raises:
        CheckpointError: all checkpoints are damaged, or of another run or other data.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    if rank:
        # The first weights are drawn alike everywhere, the dropout of the steps is not.
        set_seed(session.config.seed, device_specific=True)
    checkpoints, data = session.folder.checkpoints, session.stream.digest
    if session.state.restore(
        checkpoints,
        rank=rank,
        processes=processes,
        data=data,
        hand_over_at=lambda step: session.config.stage_at(step)[0].hand_over,
    ):
        logger.info("resumed %s at step %d", session.folder.path, session.state.step)
