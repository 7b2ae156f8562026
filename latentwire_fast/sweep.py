"""Train many variants of one preset with several seeds each, and compare them in one table.

    python -m latentwire_fast.sweep configs/sweeps/smokes.json --out runs/smokes --dry-run
    python -m latentwire_fast.sweep configs/sweeps/ablation_parts.json --out runs/ablation --jobs 2
    python -m latentwire_fast.sweep configs/sweeps/ablation_parts.json --out runs/ablation --table

Each run is a process of `python -m latentwire_fast.train` in the folder OUT/VARIANT/seedS. Run the
same command again to go on: finished runs are kept, interrupted ones are resumed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentwire_fast.cli import Imports, parse_arguments, run_entry_point


@dataclass(frozen=True)
class SweepArguments:
    """Train many variants of one preset with several seeds each, and compare them in one table.

    Args:
        file: what is trained, as JSON (docs/training.md, Sweeps).
        out: folder of all runs and of the tables; runs/NAME of the file if not given.
        jobs: runs at a time; one for each GPU, or else for each core, unless given.
        seed: train with this seed instead of the file's, repeatable.
        only: train this variant alone, repeatable. The table shows all that is finished.
        dry_run: print the runs, their steps and the predicted time, and do nothing else. Where no
            run is finished, a few steps of the base are trained to measure it.
        table: write the tables of what is finished, and do nothing else.
        imports: a Python module to import first, repeatable: it registers parts of your own.
    """

    file: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    jobs: int | None = None
    seed: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    table: tyro.conf.FlagCreatePairsOff[bool] = False
    imports: Imports = ()


def main() -> None:
    """Parse, train what is left, write the tables; status 1 if a run failed."""
    args = parse_arguments(SweepArguments, prog="latentwire_fast.sweep")
    from latentwire_fast.training.sweeps.sweep import open_sweep, places_here

    sweep = open_sweep(args.file, args.out, imports=args.imports, seeds=args.seed, only=args.only)
    if args.table:
        sweep.write_tables()
        print(sweep.folder.table_text.read_text(encoding="utf-8"), end="")
        return
    places = places_here(args.jobs)
    if args.dry_run:
        print("\n".join(sweep.forecast_lines(places)))
        return
    failed = sweep.train(places)
    print(sweep.folder.table_text.read_text(encoding="utf-8"), end="")
    print(f"tables and figure: {sweep.folder.path}")
    for outcome in failed:
        log = sweep.folder.log(outcome.run.name)
        print(f"failed: {outcome.run.name}: {outcome.error} (all of it: {log})", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)
