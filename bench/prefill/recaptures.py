"""How often a stream of requests needs a graph that is not there: a simulation without a GPU.

    python -m bench.prefill.recaptures

Requests come in batches of 1 to so many prompts, each size as likely, of 33 to 48 positions. They
are read with the memory of a graph of Llama-3.1-8B, on a card where 64 GB are free beside it.
Before, a graph served one number of rows and one width, and the last 8 graphs were kept.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentwire_fast.serving.batch import Shape
from latentwire_fast.serving.buckets import row_bucket, width_bucket
from latentwire_fast.serving.graphs import GRAPH_BYTES
from latentwire_fast.serving.pass_cache import PassCache

KV_BYTES = 32 * 2 * 8 * 128 * 2  # of one position: layers, keys and values, heads, width, bf16
FREE = 64 << 30
NEW_TOKENS = 32
POSITIONS = (33, 48)
WARM_UP, REQUESTS = 2_000, 20_000


@dataclass(frozen=True)
class Graph:
    """What is kept of one."""

    bytes: int


def before(passes: PassCache[Graph], rows: int, positions: int) -> None:
    """A graph for each number of rows, 8 of them kept: `passes` has room for 8 bytes."""
    width = -(-positions // 8) * 8
    passes.get(Shape(rows, rows, width), lambda: Graph(1))


def now(passes: PassCache[Graph], rows: int, positions: int) -> None:
    """A graph for each bucket, kept as long as there is memory."""
    rows, width = row_bucket(rows), width_bucket(positions)
    size = GRAPH_BYTES + rows * (width + NEW_TOKENS) * KV_BYTES
    passes.get(Shape(rows, rows, width), lambda: Graph(size))


def recapture_rate(
    most_rows: int, *, old: bool = False, free: float = FREE, seed: int = 0
) -> tuple[float, PassCache[Graph]]:
    """The share of requests, after the warm-up, that wait for a capture; and the graphs kept."""
    draw = random.Random(seed)
    passes: PassCache[Graph] = PassCache(8 if old else free / 4)
    read = before if old else now
    captures = 0
    for number in range(WARM_UP + REQUESTS):
        if number == WARM_UP:
            captures = passes.captures
        read(passes, draw.randint(1, most_rows), draw.randint(*POSITIONS))
    return (passes.captures - captures) / REQUESTS, passes


def table() -> str:
    """Both, for batches of 1 to 8, 32 and 64."""
    lines = ["| batches of | before | now | graphs now | their memory |", "|---|---|---|---|---|"]
    for most_rows in (8, 32, 64):
        old, _ = recapture_rate(most_rows, old=True)
        new, kept = recapture_rate(most_rows)
        lines.append(
            f"| 1 to {most_rows} | {old:.0%} | {new:.1%} | {len(kept.shapes)} | "
            f"{kept.bytes / 2**30:.1f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
