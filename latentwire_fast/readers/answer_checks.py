"""Whether answers tokenise behind a reader's prompts as they will be generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.reader import Reader


def check_answers(
    examples: Iterable[Example], readers: Mapping[str, Reader], *, source: str
) -> None:
    """Raise unless every answer is tokenised after a prompt as it is on its own.

    Raises:
        ConfigError: prompt + answer would not tokenise to prompt ids + answer ids.
    """
    answers = sorted({e.answers[0] for e in examples if e.answers})
    for reader in readers.values() if answers else ():
        wrong = reader.prompts.check_alignment(answers)
        if wrong:
            before = reader.prompts.before_answer
            raise ConfigError(
                f"{len(wrong)} of {len(answers)} answers of {source}, such as {wrong[0]!r}, "
                f"tokenise differently after {before!r} for reader {reader.name!r}; leave them out "
                "of the data, or take a reader whose tokenizer ends a token there"
            )
