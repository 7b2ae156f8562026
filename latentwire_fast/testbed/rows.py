"""Training rows of the testbed readers: passages with all their questions, and two copying
drills."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedTokenizerFast

from latentwire_fast.data import testbed
from latentwire_fast.prompts.builder import CONTEXT_LABEL, PromptBuilder, Turn, context_text

Row = tuple[list[int], list[float]]
OTHER_TOKEN_WEIGHT = 0.1
LIST_SUFFIXES = (
    ".",
    " for many years.",
    " today.",
    " now.",
    " again.",
    " years old.",
    " downtown.",
)


DRILLS = 2  # item lists and shuffled chunks, first in every batch of passages


def drill_rows(size: int) -> int:
    """Rows of each drill in a batch of passages: an eighth."""
    return max(1, size // 8)


class RowMaker:
    """Training rows: passages with all their questions, lists of items, shuffled random chunks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.builder = PromptBuilder(tokenizer)
        self.rng = rng
        self.special = max(tokenizer.all_special_ids) + 1
        self.vocab_size = len(tokenizer)

    def batch(self, facts: int, size: int, *, unasked: bool = False) -> list[Row]:
        """`size` rows for the stage with `facts` facts, an eighth of them without an answer if
        asked."""
        if facts == 0:
            return [self._shuffled_chunks(64) for _ in range(size)]
        rows = [self._item_list() for _ in range(drill_rows(size))]
        rows += [self._shuffled_chunks(96) for _ in range(drill_rows(size))]
        if unasked:
            rows += [self._unasked(facts) for _ in range(drill_rows(size))]
        stages = [n for n in (1, 2, 4) if n <= facts]
        for _ in range(size - len(rows)):
            rows.append(
                self._passage(facts if self.rng.random() < 0.8 else self.rng.choice(stages))
            )
        return rows

    def _passage(self, facts: int) -> Row:
        passage = testbed.make_passage(self.rng, facts=facts, split="train")
        turns = [Turn(question, answer) for question, answer in passage.questions]
        prompt = self.builder.build(turns, context=passage.context)
        return prompt.ids, [1.0 if t else OTHER_TOKEN_WEIGHT for t in prompt.is_target]

    def _unasked(self, facts: int) -> Row:
        """A cut context and no question: the answer is nothing.

        Only this kind. Readers that also learned to say nothing to a question on somebody else said
        nothing to every latent that was not yet perfect, which left little to learn from.
        """
        passage = testbed.make_passage(self.rng, facts=facts, split="train")
        text = self.builder.text_ids(context_text(passage.context))
        cut = text[: self.rng.randint(1, len(text))]
        prompt = self.builder.build([Turn("")], context=None, user_ids=cut)
        prompt.add([self.builder.eos_id], target=True)
        return prompt.ids, [1.0 if t else 0.0 for t in prompt.is_target]

    def _shuffled_chunks(self, length: int) -> Row:
        """Chunks of random tokens, listed again and again, each time in another order.

        A chunk's first token says how it goes on. The order must change: blocks repeated as they
        were can be copied by distance alone, and readers that had learned just that reached a copy
        accuracy of 0.997 on repeats but 0.70 on names.
        """
        size = self.rng.choice((2, 2, 3, 4))
        count = self.rng.randint(3, max(3, length // (3 * size)))
        starts = self.rng.sample(range(self.special, self.vocab_size), count)
        chunks = [
            [start, *(self.rng.randrange(self.special, self.vocab_size) for _ in range(size - 1))]
            for start in starts
        ]
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) + size * count <= length:
            first_time = not ids
            self.rng.shuffle(chunks)
            for chunk in chunks:
                ids += chunk
                weights += [0.0] + [0.0 if first_time else 1.0] * (size - 1)
        return ids, weights

    def _item_list(self, items: int = 6) -> Row:
        """Items in one order, then each again after the anchor; its first token says which."""
        starts: set[str] = set()
        words: list[str] = []
        while len(words) < items:
            kind = self.rng.random()
            if kind < 0.65:
                word = testbed.random_name(self.rng)
            elif kind < 0.8:
                word = str(self.rng.randint(10, 99))
            else:
                word = f"{self.rng.choice(testbed.COLOURS)} {self.rng.choice(testbed.OBJECTS)}"
            start = word[0] if word.isdigit() else word.split()[0][:3]
            if start not in starts:
                starts.add(start)
                words.append(word)
        text = "".join(f" {w}{self.rng.choice(LIST_SUFFIXES)}" for w in words)
        ids = self.builder.text_ids(CONTEXT_LABEL + text)
        weights = [0.0] * len(ids)
        anchor = self.builder.text_ids(f"\n{self.builder.anchor}")
        self.rng.shuffle(words)
        for word in words:
            answer = self.builder.target_ids(word)
            ids += anchor + answer
            weights += [0.0] * (len(anchor) + 1) + [1.0] * (len(answer) - 1)
        return ids, weights


def collate(rows: list[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids `[B, T]` and loss weights `[B, T]` (0 on padding)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [pad_id] * (width - len(r)) for r, _ in rows])
    weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])
    return ids, weights
