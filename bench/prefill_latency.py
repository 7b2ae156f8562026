"""Time from a request to its first token: from text, from a payload, from keys and values.

    python bench/prefill_latency.py --readers testbed:llama testbed:qwen --text-tokens 57 200 \
        --latents 8 16 --batches 1 8 --out runs/prefill                      # CPU, a minute or two
    python bench/prefill_latency.py --readers llama-160m qwen2-160m --text-tokens 512 --latents 32
    python bench/prefill_latency.py --predict                                # no GPU, no weights
    make gpu-prefill OUT=folder                                              # 8B and 7B on a GPU

A reader is a shape with random weights (`bench/prefill/shapes.py`), a local folder or a hub id.
Every row first passes a gate: its logits are those of the same prefill in transformers' own eager
path. The runs of one reader and batch interleave. Needs torch, transformers and numpy; draws its
figure where matplotlib is installed, and shows progress where tqdm is. `docs/prefill.md` explains
the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# This folder, which Python put there, holds others named like packages (`kernels`).
sys.path[0] = str(ROOT)

from bench.command_line import parser_of  # noqa: E402
from bench.prefill.rows import (  # noqa: E402
    DTYPES,
    ENGINES,
    METHODS,
    TEMPLATE_POSITIONS,
    Sizes,
    adapter_of,
    plan_of,
)

DEFAULT_READERS = ("llama-3.1-8b", "qwen2.5-7b")
GPUS = ("H100", "H200")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("prefill_latency")
    add = parser.add_argument
    add("--readers", nargs="+", default=list(DEFAULT_READERS), help="shapes, folders or hub ids")
    add("--latents", nargs="+", type=int, default=[16, 32, 64], help="M")
    add("--text-tokens", nargs="+", type=int, default=[250, 1000, 4000], help="of the context")
    add("--data", type=Path, help="a SQuAD-format file, whose contexts replace --text-tokens")
    add("--batches", nargs="+", type=int, default=[1, 8, 32])
    add("--bits", nargs="+", type=int, default=[6], choices=(16, 8, 6, 4))
    add("--d-z", type=int, default=32, help="width of a latent")
    add("--adapter", default="mlp", choices=("mlp", "linear"), help="latent to soft tokens")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--engines", nargs="+", choices=ENGINES, help="eager, and graph on a GPU, if not given")
    add("--encoder", default="llama-160m", help="shape of the sender's encoder")
    add("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU, if not given")
    add("--attention", default="sdpa", help="attn_implementation of the reader")
    add("--load-in-4bit", action="store_true", help="NF4 weights, through bitsandbytes")
    add("--half-on-cpu", action="store_true", help="the first half of the reader's layers")
    add("--device", help="cuda:0 where there is one, if not given")
    add("--warm-ups", type=int, default=10)
    add("--repeats", type=int, default=50)
    add("--budget", type=float, help="seconds for everything; slow rows then get fewer runs")
    add("--until", type=float, help="the same, as a reading of time.monotonic() on this machine")
    add("--most-tokens", type=int, help="of the texts of a batch together; longer are left out")
    add(
        "--sender-batches",
        nargs="+",
        type=int,
        help="that have rows with an encoder; all if not given",
    )
    add("--commit", help="of this tree, where git cannot tell")
    add("--out", type=Path, help="folder for results.json, samples.csv, tables and figure")
    add("--predict", action="store_true", help="print the analytic model's table and stop")
    add("--gpus", nargs="+", default=list(GPUS), choices=GPUS, help="datasheets for --predict")
    args = parser.parse_args(arguments)
    for name in ("readers", "latents", "text_tokens", "batches", "bits"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    for name in ("latents", "text_tokens", "batches", "d_z", "repeats"):
        if min(_listed(getattr(args, name))) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected numbers of at least 1")
    if args.warm_ups < 0:
        parser.error("--warm-ups: expected a number of at least 0")
    if args.data and args.predict:
        parser.error("--predict knows no texts; use --text-tokens")
    return args


def _listed(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


# --- prediction -----------------------------------------------------------------------------------


def predict(args: argparse.Namespace) -> None:
    """Print what a table should look like, from configurations and datasheets."""
    from bench.kernels.ceilings import DATASHEETS, REACHABLE
    from bench.prefill.results import Results, for_text, result_of
    from bench.prefill.shapes import config_of
    from bench.prefill.tables import markdown
    from latentwire_fast.readers.shapes import Dims

    args.engines = args.engines or ["eager", "graph"]
    plan, element = plan_of(args), DTYPES[args.dtype or "bfloat16"]
    for gpu in args.gpus:
        results = Results({"gpu": DATASHEETS[gpu].name, "rates": REACHABLE[gpu].to_json()})
        for reader in args.readers:
            dims, encoder = Dims.of(config_of(reader)), Dims.of(config_of(args.encoder))
            sizes = Sizes(dims, encoder, args.d_z, TEMPLATE_POSITIONS, element, adapter_of(args))
            for batch in args.batches:
                for row in plan.rows(reader, batch, dims, element=element):
                    size = payload_bytes(row.latents, args.d_z, row.bits)
                    result = result_of(
                        *(row, sizes),
                        ceilings=DATASHEETS[gpu],
                        rates=REACHABLE[gpu],
                        payload_bytes=size,
                    )
                    for tokens in [row.text_tokens] if row.text_tokens else plan.lengths(batch):
                        results.results.append(for_text(result, tokens, None))
        print(f"## {DATASHEETS[gpu].name}: predicted, nothing measured\n\n{markdown(results)}")
        if args.out:
            (args.out / gpu).mkdir(parents=True, exist_ok=True)
            (args.out / gpu / "predicted.md").write_text(markdown(results))


def payload_bytes(latents: int | None, d_z: int, bits: int | None) -> int | None:
    """The length of a payload of this shape."""
    import torch

    from bench.prefill.cases import GROUP_SIZE
    from latentwire_fast import wire

    if latents is None or bits is None:
        return None
    return len(wire.pack(torch.ones(latents, d_z), bits=bits, group_size=GROUP_SIZE))


# --- measurement ----------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Any:
    """Measure all rows; see `bench/prefill/measure.py`."""
    from bench.prefill.measure import measure

    return measure(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where nothing could be measured, or predicted or measured as asked."""
    from latentwire_fast.errors import LatentWireError

    args = parse(arguments)
    try:
        if args.predict:
            predict(args)
            return 0
        return int(not measure(args).results)
    except (LatentWireError, OSError, ValueError) as error:
        print(f"prefill_latency: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
