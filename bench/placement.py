"""Placement of a K/V prefix against the loop over layers that peft and transformers use.

    python bench/placement.py                    # CPU, 32 layers, P = 100, batch 1 and 8
    python bench/placement.py --device cuda:0    # prefix on the CPU, reader on a GPU

Every row is checked against the loop, bit for bit, before it is timed; runs of all rows interleave.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from latentwire_fast import placement
from latentwire_fast.kv_cache import CacheFiller

LAYERS, HEADS, POSITIONS, WIDTH = 32, 8, 100, 128  # Llama-3.1-8B
WARM_UPS = 3


@dataclass(frozen=True)
class Case:
    """One placement: a prefix of `rows` for a batch of `batch`, from its dtype to the cache's."""

    rows: int
    batch: int
    prefix_dtype: torch.dtype
    cache_dtype: torch.dtype

    def __str__(self) -> str:
        names = [str(t).removeprefix("torch.") for t in (self.prefix_dtype, self.cache_dtype)]
        return f"rows {self.rows}, batch {self.batch}, {names[0]} -> {names[1]}"


CASES = [
    Case(rows, batch, torch.float32, cache_dtype)
    for rows, batch in ((1, 1), (1, 8), (8, 8))
    for cache_dtype in (torch.bfloat16, torch.float32)
]


def loop_over_layers(prefix_L2BHPD: torch.Tensor, case: Case, device: str) -> Cache:
    """Two moves, two casts and two concatenations per layer."""
    cache = DynamicCache()
    for number, layer_2BHPD in enumerate(prefix_L2BHPD):
        keys, values = (
            part.expand(case.batch, -1, -1, -1).to(device).to(case.cache_dtype)
            for part in layer_2BHPD
        )
        cache.update(keys, values, number)
    return cache


def methods(case: Case, device: str) -> dict[str, Callable[[torch.Tensor], Cache]]:
    """The rows of one case: the loop, the torch path, and the extension when it is built."""
    extension = placement._C

    def make_filler(native: object) -> CacheFiller:
        placement._C = native  # type: ignore[assignment]
        names = [device] * LAYERS
        filler = CacheFiller(names, dtype=case.cache_dtype, heads=HEADS, head_width=WIDTH)
        placement._C = extension
        return filler

    def fill(filler: CacheFiller, prefix: torch.Tensor) -> Cache:
        cache = DynamicCache()
        filler.fill(cache, prefix_L2BHPD=prefix, batch_size=case.batch)
        return cache

    rows = {"loop over layers": lambda prefix: loop_over_layers(prefix, case, device)}
    torch_path = make_filler(None)
    rows["torch path"] = lambda prefix: fill(torch_path, prefix)
    if extension is not None:
        native = make_filler(extension)
        rows["extension"] = lambda prefix: fill(native, prefix)
    return rows


def milliseconds(run: Callable[[torch.Tensor], Cache], prefix: torch.Tensor, device: str) -> float:
    started = time.perf_counter()
    run(prefix)
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))
    return 1e3 * (time.perf_counter() - started)


def assert_equal(one: Cache, other: Cache) -> None:
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def main(device: str = "cpu", repeats: int = 20) -> None:
    """Time the placement of a prefix.

    Args:
        device: where the reader's layers live; the prefix is on the CPU.
        repeats: timed runs of each row.
    """
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for case in CASES:
        shape = (LAYERS, 2, case.rows, HEADS, POSITIONS, WIDTH)
        prefix = torch.randn(shape).to(case.prefix_dtype)
        rows = methods(case, device)
        expected = rows["loop over layers"](prefix)
        for run in rows.values():
            assert_equal(run(prefix), expected)
            for _ in range(WARM_UPS):
                run(prefix)
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(repeats):
            for name, run in rows.items():
                times[name].append(milliseconds(run, prefix, device))
        base = statistics.median(times["loop over layers"])
        print(case)
        for name, taken in times.items():
            low, *_, high = statistics.quantiles(taken, n=5)
            middle = statistics.median(taken)
            print(
                f"  {name:17} {middle:9.3f} ms (p20 {low:.3f}, p80 {high:.3f})  "
                f"{base / middle:6.1f}x"
            )


if __name__ == "__main__":
    import tyro  # not where only the rows are wanted (bench_placement.py)

    tyro.cli(main)
