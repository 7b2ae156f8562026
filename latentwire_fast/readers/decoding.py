"""Decoding: a reader picks tokens greedily, but for the options that say otherwise."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.config.schema import check_decoding
from latentwire_fast.errors import ConfigError


@dataclass(frozen=True)
class DecodeOptions:
    """Greedy decoding and its few exceptions.

    Attributes:
        max_new_tokens: stop after so many tokens.
        first_token_temperature: above 0, the first token is sampled.
        first_token_top_p: nucleus for that sample.
        temperature: above 0, every token is sampled; the first one at `first_token_temperature`,
            where that is above 0 too.
        eos_ban_steps: forbid the tokens that end an answer for the first steps. Short answers go
            on with words that mean nothing then, so the default is 0.
        seed: decides the samples, together with each example's number.
    """

    max_new_tokens: int = 12
    first_token_temperature: float = 0.0
    first_token_top_p: float = 1.0
    eos_ban_steps: int = 0
    seed: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}, expected at least 1")
        check_decoding(self.first_token_temperature, self.first_token_top_p, self.eos_ban_steps)
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}, expected 0 or above")

    def sampling(self, step: int) -> tuple[float, float]:
        """Temperature and nucleus of one step; temperature 0 is the likeliest token."""
        if step == 0 and self.first_token_temperature > 0:
            return self.first_token_temperature, self.first_token_top_p
        return self.temperature, 1.0


def token_ids(declared: Any) -> Iterator[int]:
    """The ids in what a model declares: None, a number, a tensor, or lists of these."""
    if isinstance(declared, Tensor):
        declared = declared.tolist()
    if isinstance(declared, list | tuple):
        for part in declared:
            yield from token_ids(part)
    elif isinstance(declared, int) and declared >= 0:
        yield declared


def pick_tokens(
    logits_BV: Tensor,
    step: int,
    options: DecodeOptions,
    *,
    numbers: Sequence[int],
    stop_ids: Sequence[int],
) -> Tensor:
    """The tokens `[B]` of one decoding step from fp32 logits, one for each token (`of_tokens` of
    a reader).

    Args:
        numbers: of the examples; they and the seed decide what is sampled.
        stop_ids: the tokens that end an answer.
    """
    if step < options.eos_ban_steps:
        logits_BV = logits_BV.clone()
        logits_BV[:, [*stop_ids]] = -torch.inf
    temperature, top_p = options.sampling(step)
    if temperature <= 0:
        return logits_BV.argmax(-1)
    probs = (logits_BV / temperature).softmax(-1)
    sorted_probs, order = probs.sort(-1, descending=True)
    outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p
    cumulative = sorted_probs.masked_fill(outside, 0.0).double().cumsum(-1)
    key = f":{step}" if step else ""
    uniform = [random.Random(f"{options.seed}:{number}{key}").random() for number in numbers]
    level = cumulative.new_tensor(uniform)[:, None] * cumulative[:, -1:]
    rank = torch.minimum((cumulative <= level).sum(-1), (~outside).sum(-1) - 1)
    return order.gather(1, rank[:, None])[:, 0]
