"""Whether the work of frozen models is kept on disk, and how large that becomes: said before the
first byte is written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.streams import ExampleStream, TrainItem
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.objectives.objective_set import ObjectiveSet

logger = logging.getLogger(__name__)

SAMPLE = 32  # items that the size is estimated from
WORTH_A_WORD = 2**20  # bytes


def keeps(
    objectives: ObjectiveSet, config: RunConfig, stream: ExampleStream, folder: RunFolder
) -> bool:
    """Whether there is room for what the run would keep; also says how much that is."""
    # No more than it will read.
    items = min(len(stream.items), config.total_steps * config.optim.batch_size)
    sample = stream.items[:SAMPLE]
    size = estimated_bytes(objectives, config, sample) * items // len(sample)
    place = folder.frozen_work.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    amount = f"about {size / 2**30:.2f} GiB for {items:,} texts"
    if size > 0.9 * free:
        logger.warning(
            "frozen models' work is not kept: %s do not fit on the disk of %s (%.2f GiB free)",
            *(amount, place, free / 2**30),
        )
        return False
    if size > WORTH_A_WORD:
        logger.warning(
            "frozen models' work is kept in %s (%s); --no-cache does without, and removes it",
            *(folder.frozen_work, amount),
        )
    return True


def estimated_bytes(objectives: ObjectiveSet, config: RunConfig, items: Sequence[TrainItem]) -> int:
    """How many bytes a run keeps of these items: each kind of work is kept once for all stages."""
    encoder, names = objectives.model.encoder, sorted(objectives.readers)
    size = sum(encoder.kept_bytes(item.context) for item in items)
    largest: dict[str, int] = {}
    for stage in config.stages:
        for kind, objective in objectives.of(stage).items():
            found = 0
            for prepared in objectives.prepare(items, stage, names):
                found += sum(objective.kept_bytes(prepared, objectives.readers[n]) for n in names)
            largest[kind] = max(largest.get(kind, 0), found)
    return size + sum(largest.values())
