"""How little each token of a text was expected by a reader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentwire_fast.prompts.builder import context_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.target_scores import PASS_LOGITS


@torch.no_grad()
def token_self_information(reader: Reader, contexts: Sequence[str]) -> list[Tensor]:
    """-log p of each token of each context, in nats: `[tokens]` fp32 each, given the tokens before.

    The context stands where a text prompt has it, behind its label; no question is seen.

    Raises:
        DataError: the reader has no positions for a context.
    """
    builder = reader.prompts
    label = len(builder.label_ids)
    prompts = []
    for ids in builder.text_ids_of_many([context_text(context) for context in contexts]):
        prompt = builder.build_context("", max_tokens=0)
        prompt.add(ids[:label])
        prompt.add(ids[label:], target=True)
        prompts.append(prompt)
    longest = max((len(prompt.ids) for prompt in prompts), default=1)
    size = max(1, PASS_LOGITS // (reader.head_weight.shape[0] * longest))
    found: list[Tensor] = []
    for start in range(0, len(prompts), size):
        scores = reader.score(prompts[start : start + size])
        found += [-gold_n.float().cpu() for gold_n in scores.by_prompt(scores.gold_N)]
    return found


def word_self_information(
    reader: Reader, contexts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[list[float]]:
    """Mean of -log p over the tokens of each word of each context.

    Args:
        spans: per context, the words: first character and the one behind the last.

    Raises:
        DataError: as `token_self_information`.
    """
    rows = token_self_information(reader, contexts)
    return [
        _by_word(reader, context, information.tolist(), words)
        for context, information, words in zip(contexts, rows, spans, strict=True)
    ]


def _by_word(
    reader: Reader, context: str, information: list[float], words: Sequence[tuple[int, int]]
) -> list[float]:
    """A token belongs to the word in which it ends; one that ends between two words, to none."""
    label = len(reader.prompts.label_ids)
    shift = len(context_text(context)) - len(context)
    ends = [end - shift for end in reader.prompts.text_ends(context_text(context))[label:]]
    means, token = [], 0
    for start, end in words:
        inside = []
        while token < len(ends) and ends[token] <= end:
            if ends[token] > start:
                inside.append(information[token])
            token += 1
        means.append(sum(inside) / len(inside) if inside else 0.0)
    return means
