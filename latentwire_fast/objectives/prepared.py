"""A training item with the prompts that objectives read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from latentwire_fast.config.schema import Mode
from latentwire_fast.data.streams import TrainItem
from latentwire_fast.prompts.builder import Prompt, replaced_text
from latentwire_fast.readers.reader import Reader

Key = tuple[str, str]  # (objective or kind of prompt, reader name)


@dataclass
class PreparedItem:
    """A training item with every prompt that its stage needs, and what each objective counts.

    Attributes:
        mode: what the latent stands for.
        chunks: of the context, a latent for each.
        prompts: by (kind of prompt, reader). Objectives that read the same prompt use one kind.
        counts: by (objective, reader), how many terms its sum has for this item.
    """

    item: TrainItem
    mode: Mode
    prompts: dict[Key, Prompt] = field(default_factory=dict)
    counts: Counter[Key] = field(default_factory=Counter)
    chunks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.chunks = self.chunks or (self.item.context,)

    @property
    def question(self) -> str | None:
        """The question that the encoder reads: the first in pure mode, else None."""
        return self.item.question if self.mode == "pure" else None

    def prompt(self, kind: str, reader: Reader, build: Callable[[], Prompt]) -> Prompt:
        """The prompt of a kind for one reader, built the first time that it is asked for."""
        key = kind, reader.name
        if key not in self.prompts:
            self.prompts[key] = build()
        return self.prompts[key]

    def latent_prompt(self, reader: Reader) -> Prompt:
        """Kind `latent`: the item's questions and answers behind its latent."""
        item, builder = self.item, reader.prompts
        return self.prompt(
            "latent",
            reader,
            lambda: builder.build(item.turns, context=item.context, latent=self.mode),
        )

    def text_prompt(self, reader: Reader) -> Prompt:
        """Kind `text`: the same questions and answers behind the context as text."""
        item, builder = self.item, reader.prompts
        return self.prompt("text", reader, lambda: builder.build(item.turns, context=item.context))

    def content_prompt(self, reader: Reader) -> Prompt:
        """Kind `content`: the reader's tokens of the text that the latent stands for."""

        def build() -> Prompt:
            prompt = Prompt()
            text = replaced_text(self.item.context, self.item.question, mode=self.mode)
            prompt.add(reader.prompts.text_ids(text) or [reader.prompts.eos_id], content=True)
            return prompt

        return self.prompt("content", reader, build)


def total_counts(prepared: Iterable[PreparedItem]) -> Counter[Key]:
    """The count of each objective over a whole batch."""
    return sum((item.counts for item in prepared), Counter())


def count_targets(prompt: Prompt, limit: int | None = None) -> int:
    """Target tokens of a prompt; with a limit, at most so many of each answer (EOS included)."""
    total = step = 0
    for is_target in prompt.is_target:
        step = step + 1 if is_target else 0
        total += is_target and (limit is None or step <= limit)
    return total
