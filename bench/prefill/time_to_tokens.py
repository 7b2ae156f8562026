"""Time until the first token and until n tokens are on the host, by engine.

    python -m bench.prefill.time_to_tokens --reader llama-160m --batch 8 --tokens 1 8 32 [--json F]

A prefill, then n - 1 decoding steps: with the engine `graph` each step is one graph as well. Rows
never end early. On a machine without a CUDA device there is the engine `eager` alone. Medians of
runs in which all rows take turns. Where time is short (`--until`), there is one warm-up, and there
are as many runs as fit; what could not be timed is said.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from bench.command_line import add_json, write_json
from bench.prefill.shapes import build_reader, synthetic_workload, text_prompts
from latentwire_fast.evaluation.provenance import device_name
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions


def engines(reader: Reader, *, tokens: int) -> dict[str, Receiver]:
    """A receiver of each engine that this machine has; a graph has room for so many tokens."""
    names = ("eager", "graph") if reader.device.type == "cuda" else ("eager",)
    return {
        name: Receiver.for_text(
            reader,
            options=ReceiverOptions(engine=name, new_tokens=tokens),  # type: ignore[arg-type]
        )
        for name in names
    }


def milliseconds(receiver: Receiver, prompts: Sequence[Prompt], tokens: int) -> float:
    """Of one request, until its last token is on the host."""
    options = DecodeOptions(max_new_tokens=tokens, eos_ban_steps=tokens)
    started = time.perf_counter()
    rows = receiver.generate(prompts, options=options)
    assert all(len(ids) == tokens for ids in rows)
    return 1e3 * (time.perf_counter() - started)


Times = Mapping[str, Mapping[int, Sequence[float]]]


def times_of(
    reader: Reader,
    prompts: Sequence[Prompt],
    *,
    tokens: Sequence[int],
    warm_ups: int,
    runs: int,
    until: float = math.inf,
) -> Times:
    """Milliseconds of each run, by engine and number of tokens.

    Args:
        until: a reading of `time.monotonic`, after which no request is sent.
    """
    receivers = engines(reader, tokens=max(tokens))
    found: dict[str, dict[int, list[float]]] = {e: {n: [] for n in tokens} for e in receivers}
    for run in range(warm_ups + runs):
        # The cheap ones first: a graph is there for the others then, or time is up.
        for count, name in itertools.product(sorted(tokens), receivers):
            if time.monotonic() > until:
                return found
            spent = milliseconds(receivers[name], prompts, count)
            if run >= warm_ups:
                found[name][count].append(spent)
    return found


def table(found: Times) -> str:
    """A row for each engine, a column for each number of tokens."""
    tokens = next(iter(found.values()))
    heads = " | ".join(f"{count} tokens, ms" for count in tokens)
    lines = [f"| engine | {heads} |", "|---" * (1 + len(tokens)) + "|"]
    for name, times in found.items():
        cells = [f"{median(ms):.4g}" if ms else "-" for ms in times.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    missing = [f"{name}, {n} tokens" for name, t in found.items() for n, ms in t.items() if not ms]
    return "\n".join([*lines, *(f"not measured: {cell}: out of time" for cell in missing)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reader", default="llama-160m", help="a shape, a folder or a hub id")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=250)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--until", type=float, help="the end, as a reading of time.monotonic()")
    add_json(parser)
    args = parser.parse_args(arguments)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    reader = build_reader(args.reader, dtype=dtype, device=device, attention="sdpa")
    workload = synthetic_workload(reader.prompts, rows=args.batch, tokens=args.text_tokens, seed=0)
    prompts = text_prompts(reader.prompts, workload)
    short = args.until is not None
    found = times_of(
        *(reader, prompts),
        tokens=args.tokens,
        warm_ups=min(args.warm_ups, 1) if short else args.warm_ups,
        runs=args.runs,
        until=args.until if short else math.inf,
    )
    setting = {"reader": args.reader, "batch": args.batch, "text_tokens": args.text_tokens}
    runs = {e: {n: len(ms) for n, ms in times.items()} for e, times in found.items()}
    ms = {e: {n: median(t) if t else None for n, t in times.items()} for e, times in found.items()}
    device_of = {"device": device_name(reader.device)}
    write_json({**setting, **device_of, "runs": runs, "ms": ms}, args.json)
    print(f"{args.reader}, batch {args.batch}, {args.text_tokens} tokens of text, on {device}")
    print(table(found))


if __name__ == "__main__":
    main()
