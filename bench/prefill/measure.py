"""The measuring half of `bench/prefill_latency.py`: readers, groups of rows, files after each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.kernels.ceilings import measure_ceilings, reachable
from bench.prefill.cases import Bench
from bench.prefill.cost import cpu_ceilings
from bench.prefill.files import write
from bench.prefill.group import Group, release
from bench.prefill.results import Results
from bench.prefill.rows import DTYPES, TEMPLATE_POSITIONS, Row, Sizes, adapter_of, plan_of
from bench.prefill.schedule import (
    COMPILE_SECONDS,
    KERNELS_SECONDS,
    READER_SECONDS,
    Effort,
    Timetable,
    expected_seconds,
    reason,
)
from bench.prefill.shapes import SHAPES, build_reader, config_of
from bench.prefill.tables import short_table
from bench.processes import driver
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.provenance import commit, device_name, versions
from latentwire_fast.readers import kv_placement
from latentwire_fast.readers.shapes import Dims

# A machine may be slower than predicted by this; time is shared out as if it were.
CAUTION = 1.25
# An entry of the timetable: a reader and a batch, with a third part for its rows that compile; a
# reader that is built; the kernels that a process compiles first.
Key = tuple[Any, ...]
READER, KERNELS = "reader", ("kernels",)
# Why rows are absent from files that a run left which was ended.
COMPILING = "its compilation had not ended"
# `latent` of the schema is two rows.
NOTE = "rows of method latent: those with a phase 'load encoder' are cold, the others warm"


def settle(args: argparse.Namespace) -> None:
    """Choose what was not given.

    Raises:
        LatentWireError, OSError, ValueError: a reader or an encoder that is not there, a device
            that this machine has not.
    """
    on_gpu = torch.cuda.is_available() if args.device is None else args.device != "cpu"
    args.device = args.device or ("cuda:0" if on_gpu else "cpu")
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch sees no CUDA device; use --device cpu")
    if on_gpu and torch.device(args.device).index is None:
        args.device = f"cuda:{torch.cuda.current_device()}"
    if args.half_on_cpu and not on_gpu:
        raise ConfigError("--half-on-cpu: the other half needs a CUDA device, and torch sees none")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    graphs = on_gpu and not args.half_on_cpu
    args.engines = args.engines or (["eager", "graph"] if graphs else ["eager"])
    for source in args.readers:
        config_of(source)
    if args.encoder not in SHAPES:
        raise ConfigError(f"--encoder {args.encoder}: there are {', '.join(SHAPES)}")
    if args.data and not args.data.is_file():
        raise ConfigError(f"--data {args.data}: there is no such file")


def measure(args: argparse.Namespace) -> Results:
    """Measure all rows, writing what there is after every group.

    Raises:
        as `settle` does. What goes wrong later costs its reader, group or row alone, and is told
        in the machine's `absent`.
    """
    settle(args)
    if args.until is None and args.budget is not None:
        args.until = time.monotonic() + args.budget
    with TemporaryDirectory() as scratch:
        return Run(args, Path(scratch)).measure()


def machine_record(args: argparse.Namespace, ceilings: Any) -> dict[str, Any]:
    """The provenance of the numbers."""
    return {
        "device": device_name(torch.device(args.device)),
        "driver": driver(),
        "versions": {**versions("triton"), "cuda": torch.version.cuda},
        "threads": torch.get_num_threads(),
        "commit": args.commit or commit(),
        "extension": kv_placement.has_extension(),
        "ceilings": ceilings.to_json(),
        "arguments": json.loads(json.dumps(vars(args), default=str)),
        "note": NOTE,
        "gates": [],
        "absent": [],
    }


def split_over_cpu(reader: Any, device: str) -> None:
    """Put the first half of a reader's layers on the CPU, the embeddings with them."""
    from accelerate import dispatch_model

    layers = reader.model.config.num_hidden_layers
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" for i in range(layers // 2)}
    device_map |= {f"model.layers.{i}": device for i in range(layers // 2, layers)}
    tied = reader.model.config.tie_word_embeddings
    device_map |= {"model.norm": device, "lm_head": "cpu" if tied else device}
    # With a GPU as the main device, accelerate would compute the CPU's layers there.
    dispatch_model(
        reader.model,
        device_map,
        main_device="cpu",
        skip_keys=reader.model._skip_keys_device_placement,
    )


class Run:
    """All groups of a command line, one after the other.

    Args:
        args: settled.
        scratch: a folder for weights of the encoder.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.dtype = getattr(torch, args.dtype)
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
            ceilings = measure_ceilings(args.device)
        else:
            ceilings = cpu_ceilings(self.dtype)
        self.rates = reachable(ceilings.name)
        self.results = Results(machine_record(args, ceilings))
        self.timetable = Timetable(self._expected(ceilings), deadline=args.until)
        # Two devices have no one floor.
        self.ceilings = None if args.half_on_cpu else ceilings
        self.rates = None if args.half_on_cpu else self.rates

    def measure(self) -> Results:
        """Every reader in turn."""
        for source in self.args.readers:
            self.args.name = f"{source}, half on cpu" if self.args.half_on_cpu else source
            with self._reporting(self.args.name):
                self._measure_reader(source)
            for key in self._keys(source):
                self.timetable.skip(key)
            release(self.args.device)
        for row, why in self.results.machine["absent"]:
            print(f"not measured: {row}: {why}")
        if self.args.out:
            write(self.results, self.args.out)
        return self.results

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Report an error in the block, and go on behind it."""
        try:
            yield
        except Exception as error:
            why = reason(error)
        else:
            return
        self.results.machine["absent"].append([what, why])

    def _measure_reader(self, source: str) -> None:
        args = self.args
        reader = build_reader(
            source,
            dtype=self.dtype,
            device=args.device,
            attention=args.attention,
            load_in_4bit=args.load_in_4bit,
        )
        expected: dict[int, Any] = {}
        if args.half_on_cpu:  # checked against the same reader as it was on one device
            for batch in args.batches:
                expected[batch] = self._group(reader, batch, None).logits()
            split_over_cpu(reader, args.device)
        self.timetable.skip((source, READER))
        if args.until is not None and source == args.readers[0]:
            with self._reporting(f"{args.name}, first kernels"):
                self._group(reader, args.batches[0], None).compile_kernels()
            self.timetable.skip(KERNELS)
        for batch in args.batches:
            with self._reporting(f"{args.name}, batch {batch}"):
                self._measure_group(source, reader, batch, expected.get(batch))
            release(args.device)

    def _measure_group(self, source: str, reader: Any, batch: int, expected: Any) -> None:
        """The rows of a batch. Those that compile for minutes follow the others, which are written
        before: a run that is ended meanwhile has them."""
        group, absent = self._group(reader, batch, expected), self.results.machine["absent"]
        quick, compiled = (
            [row for row in group.rows if (row.engine == "compile") == slow]
            for slow in (False, True)
        )
        if quick:
            self._measure_rows(group, quick, (source, batch))
            waiting = [[row.title, COMPILING] for row in compiled]
            absent.extend(waiting)
            self._show(batch)
            del absent[len(absent) - len(waiting) :]
        if compiled:
            self._measure_rows(group, compiled, (source, batch, "compile"))
            self._show(batch)

    def _measure_rows(self, group: Group, rows: Sequence[Row], key: Key) -> None:
        deadline, args = self.timetable.start(key), self.args
        self.results.results += group.measure(
            rows,
            ceilings=self.ceilings,
            rates=self.rates,
            machine=self.results.machine,
            effort=Effort(args.warm_ups, args.repeats, deadline, latest=args.until),
        )

    def _show(self, batch: int) -> None:
        """Print a group's rows, and write everything so far."""
        title = (self.args.name, batch)
        shown = [r for r in self.results.ordered() if (r.row.reader, r.row.batch) == title]
        print(f"\n{self.args.name}, batch {batch}\n{short_table(self.results, shown)}", flush=True)
        if self.args.out:
            write(self.results, self.args.out)

    def _group(self, reader: Any, batch: int, expected: Any) -> Group:
        args = self.args
        bench = Bench(
            *(reader, args.encoder, adapter_of(args), args.d_z),
            dtype=self.dtype,
            device=str(reader.device),
            scratch=self.scratch,
            drawn_on="cpu" if args.half_on_cpu else None,
        )
        return Group(bench, plan_of(args), args, batch=batch, expected=expected)

    def _keys(self, source: str) -> list[Key]:
        """The entries of a reader in the timetable, in order."""
        engines = {*self.args.engines}
        keys: list[Key] = [(source, READER)]
        for batch in self.args.batches:
            if engines != {"compile"}:
                keys.append((source, batch))
            if "compile" in engines:
                keys.append((source, batch, "compile"))
        return keys

    def _expected(self, ceilings: Any) -> dict[Key, float]:
        """Seconds of each group, by what its rows should take, and of what is built."""
        args = self.args
        groups: dict[Key, list[float]] = {}
        builds: dict[Key, float] = {KERNELS: KERNELS_SECONDS}
        for source in args.readers:
            for key in self._keys(source):
                if READER in key:
                    builds[key] = READER_SECONDS
                else:
                    groups[key] = row_seconds(args, key, ceilings)
                    builds[key] = COMPILE_SECONDS * ("compile" in key)
        effort = Effort(args.warm_ups, args.repeats, args.until)
        return expected_seconds(groups, builds=builds, effort=effort)


def row_seconds(args: argparse.Namespace, key: Key, rates: Any) -> list[float]:
    """Seconds that one run of each row of a group should take at these rates, with a margin."""
    source, batch, *compiled = key
    dims, encoder = Dims.of(config_of(source)), Dims.of(config_of(args.encoder))
    element = DTYPES[args.dtype]
    sizes = Sizes(dims, encoder, args.d_z, TEMPLATE_POSITIONS, element, adapter_of(args))
    return [
        CAUTION * sizes.cost(row).predict(rates, engine=row.engine)
        for row in plan_of(args).rows(source, batch, dims, element=element)
        if (row.engine == "compile") == bool(compiled)
    ]
