"""A pattern on a run folder: from its model and readers to the files beside the run's report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from latentwire_fast.config.assignments import parse_value, with_assignments
from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.serialization import from_json, read_run_config, to_json
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.evaluation.patterns.base import PatternCase, PatternConfig, PatternResult
from latentwire_fast.evaluation.patterns.given import Given, check_given
from latentwire_fast.evaluation.pipeline import rewrite_report
from latentwire_fast.evaluation.provenance import command, run_record
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.registry import PATTERNS
from latentwire_fast.serving import Receiver

DEFAULT_GIVEN: tuple[Given, ...] = ("text", "payload")


def pattern_config(name: str, options: Sequence[str] = ()) -> PatternConfig:
    """The settings of a pattern, with single fields set.

    Args:
        options: `FIELD=VALUE` each; a value is JSON, or else text.

    Raises:
        ConfigError: no such pattern or field, or a value that it cannot have.
    """
    given: dict[str, Any] = {"kind": name}
    for option in options:
        field, separator, value = option.partition("=")
        if not (field and separator):
            raise ConfigError(f"--option {option!r}: expected FIELD=VALUE, such as validation=50")
        given[field] = parse_value(value)
    config: PatternConfig = from_json(PATTERNS[name].Config, given, where=name)
    return config


def run_pattern(
    run_dir: Path,
    name: str,
    *,
    data: str | None = None,
    options: Sequence[str] = (),
    given: Sequence[str] = DEFAULT_GIVEN,
    count: int | None = None,
    out: Path | None = None,
    device: torch.device | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    assignments: Sequence[str] = (),
    reader_options: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Run a pattern with a trained run's model and readers, and write its results.

    Args:
        data: what it is measured on; each pattern says what it takes.
        options: as in `pattern_config`.
        given: what readers are given (`given.py`).
        count: how many questions are scored, at most.
        out: the results' file; `RUN/eval/pattern_NAME.json` unless given, which the report of the
            run then shows, if it has one. The answers to each question go into a file of the same
            name that ends in `.jsonl`.
        device, dtype, assignments, reader_options: as in `evaluate_run`.

    Returns:
        The content of the results' file.

    Raises:
        CheckpointError: the run is not trained, or its readers have other weights. ConfigError: a
            setting that cannot be. DataError: data that cannot be read.
    """
    folder = RunFolder(run_dir)
    if not folder.is_trained:
        raise CheckpointError(f"{run_dir} holds no trained model; train it first")
    settings, things = pattern_config(name, options), check_given(given)
    if count is not None and count < 1:
        raise ConfigError(f"examples={count}, expected at least 1")
    path = _place(folder, name, out)
    config = with_assignments(
        read_run_config(run_dir), assignments, reader_options=reader_options, trained=True
    )
    if dtype is not None:
        config = with_overrides(config, dtype=dtype)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device or PartialState().device
    model = Interlingua.from_pretrained(folder.model).to(device)
    readers = load_readers(config.readers, device, dtype=dtype)
    receivers = {key: Receiver.of(model, reader) for key, reader in readers.items()}
    case = PatternCase(config, model, receivers, data, count, things, progress)
    result: PatternResult = PATTERNS[name](settings).run(case)
    run = run_record(config, name=folder.name, device=device, eval_seed=config.data.eval_seed)
    run["command"] = command(
        "latentwire_fast.evaluate pattern",
        folder.name,
        name=name,
        data=data,
        examples=count,
        given=things if things != DEFAULT_GIVEN else (),
        option=options,
        dtype=dtype,
        set=assignments,
        reader_options=reader_options,
    )
    content = {
        "schema_version": 1,
        "pattern": name,
        "settings": to_json(settings),
        "run": run,
        **_results(result),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    records = "".join(json.dumps(record) + "\n" for record in result.records)
    write_atomically(path.with_suffix(".jsonl"), records)
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    if out is None and folder.metrics.exists():
        rewrite_report(folder)
    return content


def _results(result: PatternResult) -> Mapping[str, Any]:
    return {
        "data": result.data,
        "questions": result.questions,
        "validation": result.validation,
        "rows": [row.to_json() for row in result.rows],
        "facts": dict(result.facts),
    }


def _place(folder: RunFolder, name: str, out: Path | None) -> Path:
    """Where the results go.

    Raises:
        ConfigError: `out` cannot be written to, or is the run's own.
    """
    if out is None:
        return folder.pattern(name)
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ConfigError(f"cannot write {out}: {out.parent} is no folder that can be written to")
    if out.exists() and not out.is_file():
        raise ConfigError(f"cannot write {out}: it is no file; give the path of one")
    if folder.owns(out):
        raise ConfigError(f"{out} belongs to the run; choose another name, or leave --out away")
    if out.suffix == ".jsonl":
        raise ConfigError(f"{out}: that is where the answers go; let --out end in .json")
    return out
