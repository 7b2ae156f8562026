"""Which methods a reader has no positions for: found out before anything is scored."""

from __future__ import annotations

from latentwire_fast.errors import DataError
from latentwire_fast.evaluation.methods.base import EvaluationCase, EvaluationMethod, MethodInput
from latentwire_fast.evaluation.scoring import batches

DOES_NOT_FIT = "does not fit"
BATCH = 64  # examples whose prompts are held at a time


def why_too_long(case: EvaluationCase, method: EvaluationMethod, *, bits: int) -> str | None:
    """Why a reader with a table of positions cannot be asked by a method; None where it can.

    Raises:
        DataError: what does not fit is the prompt with a latent, without which there is nothing to
            evaluate.
    """
    reader = case.reader
    if not reader.learns_positions:
        return None
    most = 0
    for rows in batches(len(case.examples), BATCH):
        inputs = method.build(case, rows, bits=bits)
        most = max([most, *_positions(case, inputs)])
        if most > reader.max_positions and inputs.payloads is not None:
            raise DataError(
                f"a prompt with a latent takes {most:,} positions, and reader {reader.name!r} "
                f"knows {reader.max_positions:,}; shorten the questions, or choose another reader"
            )
    if most <= reader.max_positions:
        return None
    return (
        f"{DOES_NOT_FIT}: a prompt takes {most:,} positions, and reader {reader.name!r} knows "
        f"{reader.max_positions:,}"
    )


def fits_not(reason: str | None) -> bool:
    """Whether a method was not measured because it does not fit."""
    return reason is not None and reason.startswith(DOES_NOT_FIT)


def _positions(case: EvaluationCase, inputs: MethodInput) -> list[int]:
    """The positions of each prompt, its gold answer included."""
    sizes = [len(prompt.ids) for prompt in inputs.prompts]
    if inputs.payloads is not None:
        return [size + case.taken(p) for size, p in zip(sizes, inputs.payloads, strict=True)]
    if inputs.embeddings is not None:
        pairs = zip(sizes, inputs.embeddings, strict=True)
        return [size + len(embedding) for size, embedding in pairs]
    return sizes
