"""Whether the readers have positions for every prompt of a run: known before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import ExampleStream, Stream, TrainItem
from latentwire_fast.errors import DataError
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader

SAMPLE = 64  # items of a stream without an end
WITH_TASK = ("autoencode", "continuation")  # prompts in which a task's token follows the latent
NOT_READ = ("answer", "content", "gist")  # tokens that are targets, and no reader's input


def check_positions(
    config: RunConfig,
    objectives: ObjectiveSet,
    stream: Stream,
    *,
    heldout: Sequence[Example] = (),
) -> None:
    """Raise unless every prompt that the run will read fits its readers.

    Only readers with a table of positions are looked at: others compute positions, and say once
    that they were not made for so many. Baselines of text that do not fit are left out of the
    evaluation, which says so; the latents must fit.

    Args:
        heldout: what the run will be evaluated on.

    Raises:
        DataError: a prompt is longer than a reader's table.
    """
    readers = {n: r for n, r in objectives.readers.items() if r.learns_positions}
    if not readers:
        return
    for stage in config.stages:
        for item in _items(config, stage, stream):
            (prepared,) = objectives.prepare([item], stage, readers)
            for (kind, name), prompt in prepared.prompts.items():
                if kind in NOT_READ:
                    continue
                where = f"stage {stage.name!r}, example {item.id!r}, prompt {kind!r}"
                latents = objectives.model.positions_of(name) * len(prepared.chunks)
                _check(prompt, readers[name], latents + (kind in WITH_TASK), where)
    for example in heldout:
        turns = [Turn(example.question, example.answers[0] if example.answers else None)]
        model = objectives.model
        asked = [example.question] if model.mode == "pure" else None
        chunks = model.cut([example.context], asked, length=objectives.chunk_length)
        for reader in readers.values():
            latents = model.positions_of(reader.name) * len(chunks.contexts)
            prompt = reader.prompts.build(turns, context=example.context, latent=model.mode)
            _check(prompt, reader, latents, f"held-out example {example.id!r}")


def _items(config: RunConfig, stage: StageConfig, stream: Stream) -> Iterator[TrainItem]:
    """The items of a stage: all of them, or a sample where there is no end."""
    if isinstance(stream, ExampleStream):
        yield from stream.items
    else:
        yield from stream.batch(0, SAMPLE, facts=config.data.facts)


def _check(prompt: Prompt, reader: Reader, latents: int, where: str) -> None:
    """Raise where a reader has too few positions.

    Args:
        latents: how many positions what stands in a latent's place takes.
    """
    positions = len(prompt.ids) + (0 if prompt.latent_at is None else latents)
    if positions > reader.max_positions:
        raise DataError(
            f"{where}: it takes {positions:,} positions, and reader {reader.name!r} knows "
            f"{reader.max_positions:,}; shorten the texts, leave out the objectives that read "
            "them, or choose another reader"
        )
