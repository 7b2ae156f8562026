"""A payload store written by Ray Data, on one machine or many: the bytes are those of
`write_store`.

Each worker is an actor that loads the model once. It gets shards with their texts, and writes their
files itself: the store's folder and the model's must be on a disk that all machines see.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latentwire_fast.errors import ConfigError, DataError, LatentWireError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.store_writer import shard_texts, write_shard
from latentwire_fast.wire.store.plan import StorePlan, finish_store, start_store


class ShardEncoder:
    """What one worker runs.

    Args:
        model: the folder of the saved model.
        device: its torch device.
        imports: modules to import first, which register parts.
    """

    def __init__(
        self, model: str, folder: str, plan: StorePlan, device: str, imports: Sequence[str]
    ) -> None:
        for name in imports:
            importlib.import_module(name)
        self.model = Interlingua.from_pretrained(model).to(device)
        self.folder, self.plan = Path(folder), plan

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch; returns how many passages each has, and what went wrong: Ray
        keeps only the words of an error, among many of its own."""
        counts, errors = [], []
        for shard, ids, texts in zip(batch["shard"], batch["ids"], batch["texts"], strict=True):
            own = dict(zip(map(str, ids), map(str, texts), strict=True))
            try:
                write_shard(self.model, self.folder, self.plan, int(shard), own)
                errors.append("")
            except (LatentWireError, OSError) as error:
                errors.append(str(error))
            counts.append(len(own))
        return {"passages": np.array(counts), "error": np.array(errors)}


def write_store_on_ray(
    model: Path,
    folder: Path,
    plan: StorePlan,
    texts: Mapping[str, str],
    *,
    workers: int,
    device: str = "cpu",
    imports: Sequence[str] = (),
    progress: bool = True,
) -> int:
    """As `write_store`, by the workers of Ray Data. Without a cluster (`ray start`, `RAY_ADDRESS`)
    Ray starts them on this machine.

    Args:
        model: the folder of the saved model, which each worker loads.
        workers: how many.
        device: of each worker; `cuda` takes one GPU for each.

    Raises:
        ConfigError: Ray is not installed, or as `write_store`.
        DataError: what stopped a worker.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers, expected at least 1")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"Ray Data cannot be imported ({error}); pip install 'latentwire-fast[ray]', or leave "
            "out --ray"
        ) from None
    start_store(folder, plan)
    todo = [s for s in range(plan.shards) if not (folder / plan.name(s)).exists()]
    missing = sum(len(plan.rows(shard)) for shard in todo)
    if todo:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar here says all
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [_row(plan, shard, texts) for shard in todo]
        written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardEncoder,
            fn_constructor_args=(
                *(str(model.resolve()), str(folder.resolve()), plan, device, [*imports]),
            ),
            batch_size=1,
            concurrency=workers,
            num_gpus=1 if device == "cuda" else 0,
        )
        label = f"encode (Ray, workers: {workers})"
        done = plan.passages - missing
        with tqdm(
            total=plan.passages, initial=done, desc=label, unit=" passages", disable=not progress
        ) as bar:
            errors: list[str] = []  # raised when all other shards are there
            for batch in written.iter_batches(batch_size=None):
                errors += [str(error) for error in batch["error"] if error]
                bar.update(int(batch["passages"].sum()))
        if errors:
            raise DataError(errors[0])
    finish_store(folder, plan)
    return missing


def _row(plan: StorePlan, shard: int, texts: Mapping[str, str]) -> dict[str, Any]:
    own = shard_texts(plan, shard, texts)
    return {"shard": shard, "ids": [*own], "texts": [*own.values()]}
