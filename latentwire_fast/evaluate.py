"""Evaluate a trained run, or score a file of predictions.

    python -m latentwire_fast.evaluate --run runs/demo
    python -m latentwire_fast.evaluate --run runs/demo --fresh-seed 7 --examples 200 --out new.json
    python -m latentwire_fast.evaluate score --data squad.json --predictions predictions.json

The first scores the held-out examples of the run again, the second new ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from latentwire_fast.cli import Dtype, choose_device, quiet_libraries, run_entry_point


@dataclass(frozen=True)
class RunArguments:
    """Score a trained run on held-out examples and write its report.

    Args:
        run: the run folder.
        fresh_seed: score held-out examples drawn with this seed: new ones of the testbed, another
            sample of a finite set.
        examples: how many examples (the run's own number if not given).
        out: write metrics.json to this file only, outside the run folder; required with
            --fresh-seed.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: that the readers compute in; the run's own unless given.
    """

    run: Path
    fresh_seed: int | None = None
    examples: int | None = None
    out: Path | None = None
    device: str | None = None
    dtype: Dtype | None = None


@dataclass(frozen=True)
class ScoreArguments:
    """Official SQuAD scores (exact match and F1) of a file of predictions.

    Args:
        data: a file in SQuAD's format.
        predictions: a JSON object of question id to answer text.
    """

    data: Path
    predictions: Path


def score(arguments: list[str]) -> None:
    """Print official scores as JSON."""
    args = tyro.cli(ScoreArguments, args=arguments, prog="latentwire_fast.evaluate score")
    from latentwire_fast.evaluation.squad_score import score_file

    print(json.dumps(score_file(args.data, args.predictions)))


def evaluate() -> None:
    """Evaluate a run and say where the report is."""
    args = tyro.cli(RunArguments, prog="latentwire_fast.evaluate")
    quiet_libraries()
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.evaluation.pipeline import evaluate_run

    if args.fresh_seed is not None and args.out is None:
        raise ConfigError("--fresh-seed needs --out FILE: the run's own report stays as it is")
    metrics = evaluate_run(
        args.run,
        fresh_seed=args.fresh_seed,
        count=args.examples,
        out=args.out,
        device=None if args.device is None else choose_device(args.device),
        dtype=args.dtype,
    )
    from latentwire_fast.evaluation.console import summary_lines
    from latentwire_fast.files.run_folder import RunFolder

    print("\n".join(summary_lines(metrics)))
    print(f"metrics: {args.out}" if args.out else f"report: {RunFolder(args.run).report}")


def main() -> None:
    """`score ...` scores a file, anything else evaluates a run."""
    if sys.argv[1:2] == ["score"]:
        score(sys.argv[2:])
    else:
        evaluate()


if __name__ == "__main__":
    run_entry_point(main)
