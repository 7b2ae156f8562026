"""Evaluate a trained run, try a pattern of its readers, or score a file of predictions.

    python -m latentwire_fast.evaluate --run runs/demo
    python -m latentwire_fast.evaluate --run runs/demo --fresh-seed 7 --examples 200 --out new.json
    python -m latentwire_fast.evaluate score --data squad.json --predictions predictions.json
    python -m latentwire_fast.evaluate pattern --run runs/demo --name joint_rescoring

The first scores the held-out examples of the run again, the second new ones. The last has the
readers work on one task together (docs/patterns.md).

From Python: `latentwire_fast.evaluate("runs/demo")`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from latentwire_fast.cli import (
    Assignments,
    Dtype,
    Imports,
    Language,
    ReaderOptions,
    choose_device,
    make_callable,
    parse_arguments,
    program,
    run_entry_point,
)

if TYPE_CHECKING:  # `--help` does without torch
    import torch


@dataclass(frozen=True)
class RunArguments:
    """Score a trained run on held-out examples and write its report.

    Args:
        run: the run folder.
        fresh_seed: score held-out examples drawn with this seed: new ones of the testbed, another
            sample of a finite set.
        examples: how many examples (the run's own number if not given).
        out: write metrics.json to this file only, outside the run folder; required with
            --fresh-seed and --best.
        best: score the model of the step that validated best, where the run validated.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: that the readers compute in; the run's own unless given.
        assignments: PATH=VALUE, repeatable: sets a field of the readers or of the evaluation, such
            as evaluation.batch_size=8. A value is JSON, or else text.
        reader_options: NAME.FIELD=VALUE, repeatable: how a reader is loaded. FIELD is dtype (to
            compute in), device_map, max_memory or attn_implementation.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    run: Path
    fresh_seed: int | None = None
    examples: int | None = None
    out: Path | None = None
    best: tyro.conf.FlagCreatePairsOff[bool] = False
    device: str | None = None
    dtype: Dtype | None = None
    assignments: Assignments = ()
    reader_options: ReaderOptions = ()
    imports: Imports = ()


@dataclass(frozen=True)
class ScoreArguments:
    """Official SQuAD scores (exact match and F1) of a file of predictions.

    Args:
        data: a file in SQuAD's format.
        predictions: a JSON object of question id to answer text ("" for "no answer").
        no_answer_scores: v2.0: a JSON object of question id to how sure it is that there is no
            answer; adds the best scores that a threshold gives.
        no_answer_threshold: above it, a question counts as answered by "no answer".
        language: whose rules compare answers: SQuAD's (en), or MLQA's for other languages.
    """

    data: Path
    predictions: Path
    no_answer_scores: Path | None = None
    no_answer_threshold: float = 1.0
    language: Language = "en"


@dataclass(frozen=True)
class PatternArguments:
    """Have the readers of a trained run work on one task together (docs/patterns.md).

    Args:
        run: the run folder.
        name: joint_rescoring, routing, two_stage, truthful, or one of your own (--import).
        data: a source as in training: the run's held-out examples unless given for
            joint_rescoring, mmlu=FILES for routing, trec=FILE or ms_marco=FILE for two_stage,
            truthful_qa=FILE for truthful.
        examples: how many questions are scored, at most.
        given: what readers are given, repeatable: text, payload, other_payload (that of another
            question's text), nothing (the question alone); text and payload unless given.
        option: FIELD=VALUE, repeatable: a setting of the pattern, such as validation=50.
        out: the results' file; RUN/eval/pattern_NAME.json unless given.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: that the readers compute in; the run's own unless given.
        assignments: PATH=VALUE, repeatable: sets a field of the readers or of the evaluation, such
            as evaluation.batch_size=8. A value is JSON, or else text.
        reader_options: NAME.FIELD=VALUE, repeatable: how a reader is loaded.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    run: Path
    name: str
    data: str | None = None
    examples: int | None = None
    given: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    out: Path | None = None
    device: str | None = None
    dtype: Dtype | None = None
    assignments: Assignments = ()
    reader_options: ReaderOptions = ()
    imports: Imports = ()


def evaluate(
    run: str | Path,
    *,
    fresh_seed: int | None = None,
    examples: int | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: Dtype | None = None,
    assignments: Sequence[str] = (),
    reader_options: Sequence[str] = (),
    progress: bool = True,
    best: bool = False,
) -> dict[str, Any]:
    """Score a trained run on held-out examples and write its report.

    Args:
        run: the run folder.
        fresh_seed: score held-out examples drawn with this seed: new ones of the testbed, another
            sample of a finite set.
        examples: how many (the run's own number if not given).
        out: write metrics.json to this file only, outside the run folder; required with
            `fresh_seed`.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: that the readers compute in; the run's own unless given.
        assignments: `PATH=VALUE` each: fields of the readers or of the evaluation.
        reader_options: `NAME.FIELD=VALUE` each: how a reader is loaded.
        progress: show a progress bar.
        best: score the model of the step that validated best, where the run validated; needs
            `out`.

    Returns:
        The content of metrics.json.

    Raises:
        ConfigError: an argument that cannot be. CheckpointError: the run is not trained, or its
            readers have other weights than it was trained for. TrainingError: the run folder is in
            use, or cannot be written to.
    """
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.evaluation.pipeline import evaluate_run

    for given, name in ((fresh_seed is not None, "fresh_seed"), (best, "best")):
        if given and out is None:
            raise ConfigError(
                f"{name} needs out (--{name.replace('_', '-')} needs --out FILE): the run's own "
                "report stays as it is"
            )
    if examples is not None and examples < 1:
        raise ConfigError(f"examples={examples}, expected at least 1")
    return evaluate_run(
        Path(run),
        fresh_seed=fresh_seed,
        count=examples,
        out=None if out is None else Path(out),
        device=choose_device(device, option="device") if isinstance(device, str) else device,
        dtype=dtype,
        assignments=assignments,
        reader_options=reader_options,
        progress=progress,
        best=best,
    )


def score_command(arguments: list[str]) -> None:
    """Print official scores as JSON."""
    args = tyro.cli(ScoreArguments, args=arguments, prog=program("latentwire_fast.evaluate score"))
    from latentwire_fast.evaluation.squad_score import score_file

    scores = score_file(
        args.data,
        args.predictions,
        no_answer_scores=args.no_answer_scores,
        no_answer_threshold=args.no_answer_threshold,
        language=args.language,
    )
    print(json.dumps(scores))


def pattern_command(arguments: list[str]) -> None:
    """Run a pattern and print its table."""
    prog = "latentwire_fast.evaluate pattern"
    args = parse_arguments(PatternArguments, prog=prog, arguments=arguments)
    from latentwire_fast.evaluation.patterns.console import pattern_lines
    from latentwire_fast.evaluation.patterns.pipeline import DEFAULT_GIVEN, run_pattern
    from latentwire_fast.files.run_folder import RunFolder

    results = run_pattern(
        args.run,
        args.name,
        data=args.data,
        options=args.option,
        given=args.given or DEFAULT_GIVEN,
        count=args.examples,
        out=args.out,
        device=None if args.device is None else choose_device(args.device),
        dtype=args.dtype,
        assignments=args.assignments,
        reader_options=args.reader_options,
    )
    print("\n".join(pattern_lines(results)))
    print(f"results: {args.out or RunFolder(args.run).pattern(args.name)}")


def evaluate_command() -> None:
    """Evaluate a run, print the results and say where the report is."""
    args = parse_arguments(RunArguments, prog="latentwire_fast.evaluate")
    metrics = evaluate(
        args.run,
        fresh_seed=args.fresh_seed,
        examples=args.examples,
        out=args.out,
        device=None if args.device is None else choose_device(args.device),
        dtype=args.dtype,
        best=args.best,
        assignments=args.assignments,
        reader_options=args.reader_options,
    )
    from latentwire_fast.evaluation.console import summary_lines
    from latentwire_fast.files.run_folder import RunFolder

    print("\n".join(summary_lines(metrics)))
    print(f"metrics: {args.out}" if args.out else f"report: {RunFolder(args.run).report}")


def main() -> None:
    """`score ...` scores a file, `pattern ...` tries a pattern, anything else evaluates a run."""
    if sys.argv[1:2] == ["score"]:
        score_command(sys.argv[2:])
    elif sys.argv[1:2] == ["pattern"]:
        pattern_command(sys.argv[2:])
    else:
        evaluate_command()


make_callable(__name__, evaluate)

if __name__ == "__main__":
    run_entry_point(main)
