"""Placement of a K/V prefix against the loop over layers that peft and transformers use.

    python -m bench.placement.placement                    # CPU, 32 layers, P = 100, batch 1 and 8
    python -m bench.placement.placement --device cuda:0    # prefix on the CPU, reader on a GPU
    python -m bench.placement.placement --cpu-time         # on a busy machine; OMP_NUM_THREADS=1

Every row is checked against the loop, bit for bit, before it is timed; runs of all rows interleave.
Two times are taken: until the cache holds the prefix, and until every layer has taken a token as
well, which is where a `DynamicCache` copies everything once more. What placement leaves to that
copy (a broadcast batch of one, a prefix's layout as its generator made it) shows there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from latentwire_fast.readers import kv_placement
from latentwire_fast.readers.kv_cache import CacheFiller

LAYERS, HEADS, POSITIONS, WIDTH = 32, 8, 100, 128  # Llama-3.1-8B
WARM_UPS = 3


@dataclass(frozen=True)
class Case:
    """One placement: a prefix of `rows` for a batch of `batch`, from its dtype to the cache's.

    Attributes:
        generated: laid out in memory as `DeepPrefix` makes it, rows and positions first; otherwise
            contiguous.
    """

    rows: int
    batch: int
    prefix_dtype: torch.dtype
    cache_dtype: torch.dtype
    generated: bool = False

    def __str__(self) -> str:
        names = [str(t).removeprefix("torch.") for t in (self.prefix_dtype, self.cache_dtype)]
        layout = "as generated" if self.generated else "contiguous"
        return f"rows {self.rows}, batch {self.batch}, {names[0]} -> {names[1]}, {layout}"

    def prefix(self) -> torch.Tensor:
        """Random values `[L, 2, rows, H, P, D]`."""
        if self.generated:
            made = torch.randn(self.rows, POSITIONS, LAYERS, 2, HEADS, WIDTH)
            return made.to(self.prefix_dtype).permute(2, 3, 0, 4, 1, 5)
        shape = (LAYERS, 2, self.rows, HEADS, POSITIONS, WIDTH)
        return torch.randn(shape).to(self.prefix_dtype)


CASES = [
    Case(rows, batch, torch.float32, cache_dtype, generated)
    for rows, batch in ((1, 1), (1, 8), (8, 8))
    for cache_dtype in (torch.bfloat16, torch.float32)
    for generated in (False, True)
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
    extension = kv_placement._C

    def make_filler(native: object) -> CacheFiller:
        kv_placement._C = native  # type: ignore[assignment]
        names = [device] * LAYERS
        filler = CacheFiller(names, dtype=case.cache_dtype, heads=HEADS, head_width=WIDTH)
        kv_placement._C = extension
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


def milliseconds(
    run: Callable[[torch.Tensor], Cache],
    prefix: torch.Tensor,
    token: torch.Tensor,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Until the prefix is in the cache, and until a token `[B, H, 1, D]` of each layer is too."""
    started = clock()
    cache = run(prefix)
    if not token.is_cpu:
        torch.accelerator.synchronize(token.device)
    placed = clock()
    for layer in range(LAYERS):
        cache.update(token, token, layer)
    if not token.is_cpu:
        torch.accelerator.synchronize(token.device)
    return 1e3 * (placed - started), 1e3 * (clock() - started)


def assert_equal(one: Cache, other: Cache) -> None:
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def report(case: Case, times: dict[str, list[tuple[float, float]]]) -> None:
    """Medians, 20th and 80th percentiles, and how many times faster than the loop."""
    print(case)
    base = [statistics.median(column) for column in zip(*times["loop over layers"], strict=True)]
    for name, taken in times.items():
        cells = []
        for column, loop in zip(zip(*taken, strict=True), base, strict=True):
            low, *_, high = statistics.quantiles(column, n=5)
            middle = statistics.median(column)
            figures = f"{middle:8.3f} ms (p20 {low:.3f}, p80 {high:.3f})"
            cells.append(f"{figures:40} {loop / middle:6.1f}x")
        print(f"  {name:17} placed {cells[0]}   first token {cells[1]}")


def main(device: str = "cpu", repeats: int = 20, cpu_time: bool = False) -> None:
    """Time the placement of a prefix.

    Args:
        device: where the reader's layers live; the prefix is on the CPU.
        repeats: timed runs of each row.
        cpu_time: that of the process, of all its threads, instead of the wall clock's.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    kind = "CPU time" if cpu_time else "wall clock"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {kind}")
    for case in CASES:
        prefix = case.prefix()
        token = torch.randn(case.batch, HEADS, 1, WIDTH).to(device, case.cache_dtype)
        rows = methods(case, device)
        expected = rows["loop over layers"](prefix)
        for run in rows.values():
            assert_equal(run(prefix), expected)
        del expected
        for run in rows.values():
            for _ in range(WARM_UPS):
                milliseconds(run, prefix, token)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(repeats):
            for name, run in rows.items():
                times[name].append(milliseconds(run, prefix, token, clock))
        report(case, times)


if __name__ == "__main__":
    import tyro  # not where only the rows are wanted (bench_placement.py)

    tyro.cli(main)
