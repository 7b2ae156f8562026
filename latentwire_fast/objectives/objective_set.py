"""The objectives of a stage, prepared and computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentwire_fast.config.schema import StageConfig, with_level
from latentwire_fast.data.streams import TrainItem
from latentwire_fast.models.dropout import DropoutRates
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.first_tokens import first_tokens
from latentwire_fast.objectives.micro_batch import EncodedBatch, ReaderBatch
from latentwire_fast.objectives.prepared import Key, PreparedItem
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import OBJECTIVES

Backward = Callable[[Tensor], None]


@dataclass
class Losses:
    """Results of one micro-batch.

    Attributes:
        total: the weighted loss, 0-d, already divided by the batch's counts.
        sums: by (objective, reader), the plain sum, detached.
        measures: by (measure, reader), what objectives report beside their loss, already divided
            by the batch's counts.
        latent_BMd: the unquantised latents of the items, detached.
        terms: by (objective, reader), the terms of the total; without their graphs where backward
            went through them already.
        first_ids: by reader, the most probable first tokens of the answers, where they are
            measured.
    """

    total: Tensor
    sums: dict[Key, Tensor]
    measures: dict[Key, Tensor]
    latent_BMd: Tensor
    terms: dict[Key, Tensor] = field(default_factory=dict)
    first_ids: dict[str, Tensor] = field(default_factory=dict)


class ObjectiveSet:
    """Prepares and computes the objectives of a run's stages.

    Args:
        readers: frozen readers by name.
        teacher: cache of the text-prompted teacher's hidden states; None computes them each time.
        chunk_length: of the chunks that contexts are cut into (`DataConfig.chunk_length`).
    """

    def __init__(
        self,
        model: Interlingua,
        readers: Mapping[str, Reader],
        *,
        teacher: TeacherCache | None = None,
        chunk_length: int | None = None,
    ) -> None:
        self.model = model
        self.readers = readers
        self.teacher = teacher
        self.chunk_length = chunk_length
        self._levels: Mapping[str, float] = {}
        self._dropout = DropoutRates(model)
        self._parts: dict[StageConfig, dict[str, Objective]] = {}

    def of(self, stage: StageConfig) -> dict[str, Objective]:
        """The objectives of a stage by name."""
        if stage not in self._parts:
            self._parts[stage] = {
                config.kind: OBJECTIVES.part_of(config)(config, self.model)
                for config in stage.objectives
            }
        return self._parts[stage]

    def set_levels(self, stage: StageConfig, levels: Mapping[str, float]) -> None:
        """From now on, take these for the numbers of a stage that are scheduled.

        Args:
            levels: by place, as in `StageConfig.schedules`: all of them.
        """
        self._levels = levels
        self._dropout.set(levels.get("dropout"))
        parts = self.of(stage)
        for place, value in levels.items():
            kind, _, name = place.partition(".")
            if name:
                parts[kind].config = with_level(parts[kind].config, name, value)

    def prepare(
        self, items: Sequence[TrainItem], stage: StageConfig, active: Iterable[str]
    ) -> list[PreparedItem]:
        """Prompts and counts of the items for the active readers."""
        readers = [self.readers[name] for name in active]
        result = []
        for item in items:
            prepared = PreparedItem(item, self.model.mode)
            if self.chunk_length is not None:
                asked = None if prepared.question is None else [prepared.question]
                cut = self.model.cut([item.context], asked, length=self.chunk_length)
                prepared.chunks = cut.contexts
            for reader in readers:
                for kind, objective in self.of(stage).items():
                    if objective.config.reads_answers and not item.turns:
                        continue
                    if objective.once and reader is not readers[0]:
                        continue
                    prepared.counts[kind, reader.name] = objective.prepare(prepared, reader)
            result.append(prepared)
        return result

    def tokens(self, stage: StageConfig, counts: Mapping[Key, int]) -> int:
        """The number of tokens that readers predict, of a batch's counts."""
        parts = self.of(stage)
        return sum(n for (kind, _), n in counts.items() if parts[kind].counted == "tokens")

    def compute(
        self,
        items: Sequence[PreparedItem],
        stage: StageConfig,
        counts: Mapping[Key, int],
        *,
        backward: Backward | None = None,
        answers: int = 0,
    ) -> Losses:
        """Losses of some of a batch's items, normalised by the whole batch's `counts`.

        Args:
            answers: of the whole batch; if given, their first tokens are measured, where the stage
                trains or reports answers (`first_tokens.py`).
            backward: if given, it is called with each reader's weighted loss before the next reader
                is run, so that one reader's graph is held at a time; then backward goes through the
                encoder, once. The gradients are those of the total, which has no graph then.
        """
        parts = self.of(stage)
        encoded = EncodedBatch(
            items,
            self.model,
            bits=stage.quantize,
            rate=any(objective.needs_rate for objective in parts.values()),
            select=any(objective.needs_positions for objective in parts.values()),
            cut=backward is not None,
            hold=stage.hold_encoder,
            gain=self._levels.get("gain", 1.0),
            dropout=self._levels.get("latent_dropout", 0.0),
        )
        losses = Losses(encoded.latent_BMd.new_zeros(()), {}, {}, encoded.latent_BMd)
        for name in sorted({name for _, name in items[0].counts}):
            batch = ReaderBatch(
                encoded,
                self.readers[name],
                teacher=self.teacher,
                terms=[part.term for part in parts.values() if part.term is not None],
                layers=sorted({number for part in parts.values() for number in part.layers}),
            )
            terms = self._reader_terms(batch, parts, counts, losses)
            if answers and any(part.config.reports_accuracy for part in parts.values()):
                _measure_first_tokens(batch, answers, losses)
            if backward is not None and terms:
                # Autocast is for forward passes: in a backward pass it would round once more.
                with torch.autocast(encoded.latent_BMd.device.type, enabled=False):
                    backward(torch.stack([*terms.values()]).sum())
                terms = {kind: term.detach() for kind, term in terms.items()}
            for kind, term in terms.items():
                losses.terms[kind, name] = term
                losses.total = losses.total + term
        if backward is not None:
            with torch.autocast(encoded.latent_BMd.device.type, enabled=False):
                encoded.backward()
        return losses

    def _reader_terms(
        self,
        batch: ReaderBatch,
        parts: Mapping[str, Objective],
        counts: Mapping[Key, int],
        losses: Losses,
    ) -> dict[str, Tensor]:
        """One reader's terms of the total, with their graphs; adds its sums and measures."""
        name, terms = batch.reader.name, {}
        for kind, objective in parts.items():
            if (kind, name) not in batch.items[0].counts:  # a batch of texts without questions
                continue
            value, count = objective.compute(batch), max(1, counts[kind, name])
            losses.sums[kind, name] = value.detach()
            for measure, reported in batch.take_reports().items():
                losses.measures[measure, name] = reported / count
            if objective.config.weight:
                terms[kind] = objective.config.weight * value / count
        return terms


def _measure_first_tokens(batch: ReaderBatch, answers: int, losses: Losses) -> None:
    """Add the first tokens' measures of one reader to its losses."""
    if not batch.items[0].item.turns:  # a batch of texts without questions
        return
    name, found = batch.reader.name, first_tokens(batch)
    losses.first_ids[name] = found.ids_N
    for measure in ("accuracy", "margin", "entropy"):
        losses.measures[f"first_token_{measure}", name] = getattr(found, measure) / answers
