"""What readers are given in the place of a text, and the payloads for that.

* `text`: the text itself.
* `payload`: its payload.
* `other_payload`: the payload of another question's text. What a score keeps of that says nothing
  about the text.
* `nothing`: the question alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from latentwire_fast import wire
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.encoding import encode_examples
from latentwire_fast.evaluation.methods.base import other_contexts
from latentwire_fast.evaluation.scoring import batches
from latentwire_fast.models.encoders.truncation import measure_truncation
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.serving.payload_batch import Message

Given = Literal["text", "payload", "other_payload", "nothing"]
GIVEN: tuple[Given, ...] = get_args(Given)


def check_given(names: Sequence[str]) -> tuple[Given, ...]:
    """The names as a tuple, each once.

    Raises:
        ConfigError: one that there is not, or none.
    """
    for name in names:
        if name not in GIVEN:
            raise ConfigError(f"given={name!r}, expected one of {', '.join(GIVEN)}")
    if not names:
        raise ConfigError(f"nothing to give readers; name one or more of {', '.join(GIVEN)}")
    return tuple(name for name in GIVEN if name in names)


class GivenTexts:
    """The texts of some examples and their payloads, each encoded once.

    Args:
        chunk_length: of the chunks that texts are cut into. None: a text is cut only if it is
            longer than the encoder reads.
    """

    def __init__(
        self,
        model: Interlingua,
        examples: Sequence[Example],
        *,
        batch_size: int,
        chunk_length: int | None = None,
    ) -> None:
        self.model, self.examples = model, examples
        texts = ((e.context, e.question) for e in examples)
        if chunk_length is None and measure_truncation(model.encoder, texts, mode=model.mode).cut:
            chunk_length = model.encoder.limit.length
        self.chunk_length = chunk_length
        self._batch_size = batch_size
        self._payloads: list[Message] | None = None

    def encode(self, examples: Sequence[Example]) -> list[Message]:
        """One payload for each example, or all those of its chunks."""
        encoded = encode_examples(self.model, examples, chunk_length=self.chunk_length)
        return [*encoded.messages(self.model)]

    @property
    def payloads(self) -> list[Message]:
        """One for each example; equal texts are encoded once."""
        if self._payloads is None:
            keys = [self._text(example) for example in self.examples]
            first = dict(zip(keys, self.examples, strict=True))
            distinct = sorted(first.values(), key=lambda example: len(example.context))
            made: dict[str, Message] = {}
            with torch.no_grad():
                for rows in batches(len(distinct), self._batch_size):
                    several = [distinct[i] for i in rows]
                    found = self.encode(several)
                    made |= zip(map(self._text, several), found, strict=True)
            self._payloads = [made[key] for key in keys]
        return self._payloads

    def _text(self, example: Example) -> str:
        """The text that a payload stands for."""
        return replaced_text(example.context, example.question, mode=self.model.mode)

    def messages(self, given: Given) -> list[Message] | None:
        """The payloads that readers are given; None for text."""
        if given in ("text", "nothing"):
            return None
        if given == "payload":
            return self.payloads
        return [self.payloads[i] for i in other_contexts(self.examples)]

    def sizes(self, given: Given) -> list[int]:
        """Bytes of what is sent of each example's text: UTF-8, or its payloads."""
        if given == "nothing":
            return [0] * len(self.examples)
        messages = self.messages(given)
        if messages is None:
            return [wire.utf8_bytes(self._text(example)) for example in self.examples]
        return [*map(wire.payload_bytes, messages)]
