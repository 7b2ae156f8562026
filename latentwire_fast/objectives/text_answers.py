"""Answers to the text itself: what a reader's low-rank updates are trained on before any latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.streams import TrainItem
from latentwire_fast.objectives.objective_set import Losses
from latentwire_fast.objectives.prepared import Key, PreparedItem, count_targets
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader

KIND = "text"


class TextAnswers:
    """Cross-entropy over the answers behind context and question as text, in the place of an
    `ObjectiveSet`; also reports their accuracy.

    Args:
        readers: by name, each with low-rank updates.
    """

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.readers = readers

    def prepare(
        self, items: Sequence[TrainItem], stage: StageConfig, active: Iterable[str]
    ) -> list[PreparedItem]:
        """Text prompts of the items, and how many of their tokens are targets."""
        result, readers = [], [self.readers[name] for name in active]
        for item in items:
            prepared = PreparedItem(item, "context")
            for reader in readers:
                count = count_targets(self.prompt(prepared, reader))
                prepared.counts[KIND, reader.name] = count
            result.append(prepared)
        return result

    def prompt(self, prepared: PreparedItem, reader: Reader) -> Prompt:
        """An item's prompt for one reader, which it keeps under `KIND`."""
        return prepared.text_prompt(reader)

    def target_hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, D]` at the positions that predict answer tokens, and those tokens."""
        batch = reader.collate(prompts)
        return reader.target_hidden(batch), batch.labels_N

    def set_levels(self, stage: StageConfig, levels: Mapping[str, float]) -> None:
        """Nothing of a stage is scheduled here."""

    def tokens(self, stage: StageConfig, counts: Mapping[Key, int]) -> int:
        """The number of tokens that readers predict, of a batch's counts."""
        return sum(counts.values())

    def compute(
        self,
        items: Sequence[PreparedItem],
        stage: StageConfig,
        counts: Mapping[Key, int],
        *,
        backward: Callable[[Tensor], None] | None = None,
        answers: int = 0,
    ) -> Losses:
        """Losses of some of a batch's items, as `ObjectiveSet.compute` gives them; there are no
        latents, and first tokens are not measured."""
        none = torch.zeros(len(items), 0, 0)
        losses = Losses(torch.zeros(()), {}, {}, none)
        for name in sorted({name for _, name in items[0].counts}):
            reader, count = self.readers[name], max(1, counts[KIND, name])
            prompts = [item.prompts[KIND, name] for item in items]
            made = reader.output_head.losses(*self.target_hidden(reader, prompts))
            losses.sums[KIND, name] = made.cross_entropy.detach()
            losses.measures["accuracy", name] = made.correct / count
            term = made.cross_entropy / count
            if backward is not None:
                backward(term)
                term = term.detach()
            losses.terms[KIND, name] = term
            losses.total = losses.total.to(term.device) + term
        return losses
