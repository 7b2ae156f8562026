"""Time from a request to its first token: from text, from a payload, from keys and values.

    python bench/prefill_latency.py --readers testbed:llama testbed:qwen --text-tokens 57 200 \
        --latents 8 16 --batches 1 8 --out runs/prefill                      # CPU, a minute or two
    python bench/prefill_latency.py --readers llama-160m qwen2-160m --text-tokens 512 --latents 32
    python bench/prefill_latency.py --predict                                # no GPU, no weights
    make gpu-prefill OUT=folder                                              # 8B and 7B on a GPU

A reader is a shape with random weights (`prefill_shapes.py`), a local folder or a hub id. Every row
first passes a gate: its logits are those of the same prefill in transformers' own eager path. The
runs of one reader and batch interleave. Needs torch, transformers and numpy; draws its figure where
matplotlib is installed, and shows progress where tqdm is. `docs/prefill.md` explains the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prefill_rows import ENGINES, METHODS, SOFT, Plan, Sizes  # noqa: E402

from latentwire_fast.config import AdapterConfig  # noqa: E402

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
DEFAULT_READERS = ("llama-3.1-8b", "qwen2.5-7b")
# Positions of template, question and anchor that a prediction assumes.
TEMPLATE_POSITIONS = 32
# What a group needs whatever its rows, in seconds; runs that every row gets; FLOP/s of a slow GPU.
GROUP_SECONDS, RUNS_OF_A_SLOW_ROW, ROUGH_FLOPS = 8.0, 12, 5e14


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. (argparse: a GPU machine has none of our other libraries.)"""
    parser = argparse.ArgumentParser(
        prog="prefill_latency", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    add("--budget", type=float, help="seconds for everything; rows then may get fewer runs")
    add("--out", type=Path, help="folder for results.json, samples.csv, tables and figure")
    add("--predict", action="store_true", help="print the analytic model's table and stop")
    add("--gpus", nargs="+", default=["H100", "H200"], help="datasheets for --predict")
    args = parser.parse_args(arguments)
    for name in ("latents", "text_tokens", "batches"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected numbers of at least 1")
    if args.data and args.predict:
        parser.error("--predict knows no texts; use --text-tokens")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    return Plan(
        methods=tuple(args.methods),
        engines=tuple(sorted(set(args.engines), key=ENGINES.index)),
        text_tokens=tuple(args.text_tokens),
        latents=tuple(args.latents),
        bits=tuple(args.bits),
    )


def adapter_of(args: argparse.Namespace) -> AdapterConfig:
    return replace(SOFT, kind=args.adapter)


# --- prediction -----------------------------------------------------------------------------------


def predict(args: argparse.Namespace) -> None:
    """Print what a table should look like, from configurations and datasheets."""
    from ceilings import DATASHEETS, REACHABLE
    from prefill_results import Results, for_text, result_of
    from prefill_shapes import Dims, config_of
    from prefill_tables import markdown

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
                    for tokens in [row.text_tokens] if row.text_tokens else plan.text_tokens:
                        results.results.append(for_text(result, tokens, None))
        print(f"## {DATASHEETS[gpu].name}: predicted, nothing measured\n\n{markdown(results)}")
        if args.out:
            (args.out / gpu).mkdir(parents=True, exist_ok=True)
            (args.out / gpu / "predicted.md").write_text(markdown(results))


def payload_bytes(latents: int | None, d_z: int, bits: int | None) -> int | None:
    """The length of a payload of this shape."""
    import torch
    from prefill_cases import GROUP_SIZE

    from latentwire_fast import wire

    if latents is None or bits is None:
        return None
    return len(wire.pack(torch.ones(latents, d_z), bits=bits, group_size=GROUP_SIZE))


# --- measurement ----------------------------------------------------------------------------------


def machine_record(args: argparse.Namespace, ceilings: Any) -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    from latentwire_fast.provenance import commit, device_name, versions

    return {
        "device": device_name(torch.device(args.device)),
        "versions": {**versions(), "cuda": torch.version.cuda},
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "ceilings": ceilings.to_json(),
        "arguments": json.loads(json.dumps(vars(args), default=str)),
        "absent": [],
    }


def split_over_cpu(reader: Any) -> None:
    """Put the first half of a reader's layers on the CPU, the embeddings with them."""
    from accelerate import dispatch_model

    layers = reader.model.config.num_hidden_layers
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" for i in range(layers // 2)}
    device_map |= {f"model.layers.{i}": "cuda:0" for i in range(layers // 2, layers)}
    tied = reader.model.config.tie_word_embeddings
    device_map |= {"model.norm": "cuda:0", "lm_head": "cpu" if tied else "cuda:0"}
    # With a GPU as the main device, accelerate would compute the CPU's layers there.
    dispatch_model(
        reader.model,
        device_map,
        main_device="cpu",
        skip_keys=reader.model._skip_keys_device_placement,
    )


def group_weight(args: argparse.Namespace, source: str) -> float:
    """Seconds that the rows of a group take per row of its batch, roughly and on a GPU: its share
    of the budget goes by this."""
    from prefill_shapes import Dims, config_of

    dims = Dims.of(config_of(source))
    encoder = Dims.of(config_of(args.encoder))
    sizes = Sizes(dims, encoder, args.d_z, TEMPLATE_POSITIONS, 2, adapter_of(args))
    rows = plan_of(args).rows(source, 1, dims, element=2)
    return RUNS_OF_A_SLOW_ROW * sum(sizes.work(row).flops for row in rows) / ROUGH_FLOPS


def share(weights: dict[tuple[str, int], float], source: str, batch: int) -> float:
    """A group's share of the time that is left to it and to those after it; takes it out."""
    whole = sum(weights.values())
    return weights.pop((source, batch)) / whole


def measure(args: argparse.Namespace) -> Any:
    """Measure all rows, writing what there is after every group."""
    with TemporaryDirectory() as scratch:
        return _measure(args, Path(scratch))


def _measure(args: argparse.Namespace, scratch: Path) -> Any:
    import torch
    from ceilings import REACHABLE, measure_ceilings
    from prefill_cases import Bench
    from prefill_cost import cpu_ceilings
    from prefill_files import write
    from prefill_group import Group, release
    from prefill_results import Results
    from prefill_shapes import build_reader
    from prefill_tables import short_table

    on_gpu = torch.cuda.is_available() if args.device is None else args.device != "cpu"
    args.device = args.device or ("cuda:0" if on_gpu else "cpu")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    graphs = on_gpu and not args.half_on_cpu
    args.engines = args.engines or (["eager", "graph"] if graphs else ["eager"])
    started = time.monotonic()
    dtype = getattr(torch, args.dtype)
    ceilings = measure_ceilings(args.device) if on_gpu else cpu_ceilings(dtype)
    rates = next((r for gpu, r in REACHABLE.items() if gpu in ceilings.name), None)
    results = Results(machine_record(args, ceilings))
    if args.half_on_cpu:
        ceilings = rates = None  # two devices have no one floor
    weights = {
        (source, batch): GROUP_SECONDS + batch * group_weight(args, source)
        for source in args.readers
        for batch in args.batches
    }
    for source in args.readers:
        reader = build_reader(
            source,
            dtype=dtype,
            device=args.device,
            attention=args.attention,
            load_in_4bit=args.load_in_4bit,
        )
        args.name = source
        if args.half_on_cpu:
            args.name = f"{source}, half on cpu"
            split_over_cpu(reader)
        bench = Bench(
            *(reader, args.encoder, adapter_of(args), args.d_z),
            dtype=dtype,
            device=str(reader.device),
            scratch=scratch,
        )
        for batch in args.batches:
            left = None if args.budget is None else args.budget - (time.monotonic() - started)
            group = Group(bench, plan_of(args), args, batch=batch)
            results.results += group.measure(
                ceilings=ceilings,
                rates=rates,
                absent=results.machine["absent"],
                seconds=None if left is None else max(left, 0) * share(weights, source, batch),
            )
            title = (args.name, batch)
            shown = [r for r in results.ordered() if (r.row.reader, r.row.batch) == title]
            print(f"\n{args.name}, batch {batch}\n{short_table(results, shown)}", flush=True)
            if args.out:
                write(results, args.out)
            del group
            release(bench.device)
        del bench, reader
    for row, reason in results.machine["absent"]:
        print(f"not measured: {row}: {reason}")
    return results


def main() -> None:
    args = parse()
    if args.predict:
        predict(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
