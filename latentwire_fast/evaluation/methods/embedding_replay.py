"""The text's own input embeddings as a prefix: a check of the way that prefixes take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    text_input,
)
from latentwire_fast.prompts.builder import Prompt


class EmbeddingReplay(EvaluationMethod):
    """The text's own embeddings as a prefix: the reader must answer as from the text."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Embedding replay", "reference"
    note = "the text's own embeddings as prefix; equals text"
    console_label = None
    is_timed = True

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """Soft prefixes in the place of the user's text."""
        reader = case.reader
        text = text_input(case, rows, [None] * len(rows))
        start = reader.prompts.content_start
        prompts: list[Prompt] = []
        embeddings: list[Tensor] = []
        for prompt in text.prompts:
            stop = start + prompt.content
            ids = torch.tensor(prompt.ids[start:stop], device=reader.device)
            embeddings.append(reader.embedding(ids))
            prompts.append(
                Prompt(
                    ids=prompt.ids[:start] + prompt.ids[stop:],
                    latent_at=start,
                    is_target=prompt.is_target[:start] + prompt.is_target[stop:],
                )
            )
        return MethodInput(prompts, text.positions, embeddings=embeddings)
