"""Distillation from several teachers, or from a stronger one: other LMs of a reader's tokenizer.

Shapes: N scored tokens, D a teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader

# Teachers in memory, for all stages that name them: by source, device and dtype.
_loaded: WeakValueDictionary[tuple[str, str, str], Reader] = WeakValueDictionary()
PROBE = "Context: Nulnak's 94 naïve friends, born in 1907.\nQuestion: Who?"


class Teachers(Objective):
    """KL divergence to the mean of the probabilities that several LMs give when they read the text,
    times tau squared.

    It is computed as the mean of the divergences to each of them. That is larger by how far the
    teachers are apart (their Jensen-Shannon divergence, a number that the reader does not change):
    the gradient is the same, and no teacher's probabilities are held for all tokens.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the distillation from several teachers.

        Attributes:
            teachers: by reader, the sources of LMs with that reader's tokenizer.
            own: whether the reader itself, with the text, is one of its teachers.
            tau: temperature of all distributions.
            tokens: how many tokens of each answer count; None: all of them and EOS.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        teachers: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
        own: bool = True
        tau: float = 1.0
        tokens: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("tokens")
            require(self.tau > 0, f"objective {self.kind!r}: tau={self.tau}, expected above 0")
            require(
                any(self.teachers.values()),
                f"objective {self.kind!r}: no teacher is named; give the sources of some by "
                "reader, or take objective 'kd', whose teacher is the reader itself",
            )

        def check(self, run: RunConfig) -> None:
            """Raise unless the readers are the run's, and each has a teacher."""
            unknown = sorted(set(self.teachers) - set(run.readers))
            require(
                not unknown,
                f"objective {self.kind!r}: teachers of {unknown}, this run has the readers "
                f"{sorted(run.readers)}",
            )
            without = sorted(n for n in run.readers if not self.teachers.get(n))
            require(
                self.own or not without,
                f"objective {self.kind!r}: readers {without} have no teacher; name one, or set "
                "own=true",
            )

        def map_sources(self, change: Callable[[str], str]) -> ObjectiveConfig:
            """A copy with all sources changed."""
            teachers = {n: tuple(map(change, s)) for n, s in self.teachers.items()}
            changes: dict[str, Any] = {"teachers": teachers}
            return replace(self, **changes)

    config: Config

    def __init__(self, config: ObjectiveConfig, model: Interlingua) -> None:
        super().__init__(config, model)
        self._of: dict[str, list[Reader]] = {}

    def _teachers(self, reader: Reader) -> list[Reader]:
        """The teachers of a reader besides itself, loaded when they are first asked for."""
        if reader.name not in self._of:
            sources = self.config.teachers.get(reader.name, ())
            self._of[reader.name] = [load_teacher(source, reader) for source in sources]
        return self._of[reader.name]

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens.

        Raises:
            ConfigError: as `load_teacher`.
        """
        self._teachers(reader)
        prepared.text_prompt(reader)
        return count_targets(prepared.latent_prompt(reader), self.config.tokens)

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """The teachers' hidden states, fp16."""
        teachers = [*self._teachers(reader), *([reader] if self.config.own else [])]
        count = count_targets(prepared.text_prompt(reader))
        return 2 * count * sum(teacher.d_model for teacher in teachers)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The mean divergence, summed over tokens."""
        losses = [
            self._divergence(
                batch,
                batch.hidden_of(teacher),
                teacher_weight=teacher.output_head.weight,
                teacher_bias=teacher.output_head.bias,
            )
            for teacher in self._teachers(batch.reader)
        ]
        if self.config.own:
            losses.append(self._divergence(batch, batch.teacher_hidden_ND))
        return torch.stack(losses).mean()

    def _divergence(self, batch: ReaderBatch, teacher_ND: Tensor, **head: Tensor | None) -> Tensor:
        """The divergence to one teacher, of these hidden states, through its own head if that is
        another."""
        counts_N = batch.answers.first_N(self.config.tokens)
        return batch.reader.output_head.losses(
            batch.answers.hidden_ND[counts_N],
            None,
            teacher_hidden=teacher_ND[counts_N],
            kd_gradient=self.config.weight != 0,
            tau=self.config.tau,
            **head,
        ).kd


def load_teacher(source: str, reader: Reader) -> Reader:
    """An LM that reads what a reader reads, on its device and in its dtype; one that is in memory
    already is taken.

    Raises:
        ConfigError: there is none, it has another tokenizer, or it makes its logits in another way.
    """
    dtype = reader.embedding.weight.dtype
    key = (source, str(reader.device), str(dtype))
    teacher = _loaded.get(key)
    if teacher is None:
        teacher = Reader.load(source, name="teacher", dtype=dtype, device=reader.device)
        _loaded[key] = teacher
    require(
        _reads_the_same(teacher, reader),
        f"teacher {source!r} has another tokenizer than reader {reader.name!r}: their "
        "probabilities are of other tokens; choose an LM of the reader's family",
    )
    ours, theirs = reader.output_head, teacher.output_head
    require(
        (ours.scale, ours.softcap) == (theirs.scale, theirs.softcap),
        f"teacher {source!r} scales or caps its logits in another way than reader "
        f"{reader.name!r}; choose an LM of the reader's family",
    )
    return teacher


def _reads_the_same(teacher: Reader, reader: Reader) -> bool:
    """Whether two tokenizers give the same ids."""
    ours, theirs = reader.prompts, teacher.prompts
    return teacher.tokenizer.get_vocab() == reader.tokenizer.get_vocab() and theirs.text_ids(
        PROBE
    ) == ours.text_ids(PROBE)
