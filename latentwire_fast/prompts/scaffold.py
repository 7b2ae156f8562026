"""What stands around the text that an encoder's LM reads, whatever its tokenizer brings along."""

from __future__ import annotations

import copy
from typing import Literal

from transformers import PreTrainedTokenizerBase

Scaffold = Literal["chat", "neutral", "none"]

# Roles in plain words, the same for every LM: no control token of any family.
NEUTRAL = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def in_scaffold(tokenizer: PreTrainedTokenizerBase, scaffold: Scaffold) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template makes this scaffold; the given one stays as it is.

    Args:
        scaffold: `chat`: its own chat template. `neutral`: the roles as plain words, where an LM
            has no template, or one that its encoder is not to depend on. `none`: no template.
    """
    if scaffold == "chat":
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = NEUTRAL if scaffold == "neutral" else None
    return other
