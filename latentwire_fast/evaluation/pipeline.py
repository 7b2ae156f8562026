"""The evaluation of a run folder, from its model and readers to the files of `RUN/eval`."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from latentwire_fast.config.assignments import with_assignments
from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.serialization import config_hash, read_run_config, to_json
from latentwire_fast.data.sources import (
    check_contexts,
    heldout_examples,
    training_examples,
    training_texts,
)
from latentwire_fast.errors import CheckpointError, ConfigError, DataError
from latentwire_fast.evaluation.collapse import measure_collapse
from latentwire_fast.evaluation.continuation import continuation_texts, measure_continuation
from latentwire_fast.evaluation.evaluator import Evaluator
from latentwire_fast.evaluation.languages import warn_of_scripts
from latentwire_fast.evaluation.model_card import model_card
from latentwire_fast.evaluation.provenance import command, commit, run_record, versions
from latentwire_fast.evaluation.report import write_report
from latentwire_fast.evaluation.results import EvaluationResults
from latentwire_fast.evaluation.text_compression import DICTIONARY_TEXTS, why_no_zstd
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.lock import RunLock
from latentwire_fast.files.records import read_records
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.encoders.truncation import measure_truncation
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.context_limit import ContextLimit
from latentwire_fast.readers.reader import load_readers

logger = logging.getLogger(__name__)


def evaluate_run(
    run_dir: Path,
    *,
    fresh_seed: int | None = None,
    count: int | None = None,
    out: Path | None = None,
    progress: bool = True,
    device: torch.device | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    assignments: Sequence[str] = (),
    reader_options: Sequence[str] = (),
    best: bool = False,
) -> dict[str, Any]:
    """Evaluate a trained run and write its report.

    Args:
        fresh_seed: score held-out examples drawn with this seed instead of the run's own: new ones
            of the testbed, another sample of a finite set.
        count: how many examples.
        out: write metrics.json to this file only, without a report; none of the run's own files.
        device: where to evaluate; as in training unless given.
        dtype: that the readers compute in; the run's own unless given. metrics.json then names the
            configuration with it.
        assignments, reader_options: fields of the readers and of the evaluation, as
            `with_assignments` takes them; metrics.json names the configuration with them.
        best: score the model of the step that validated best, kept beside the run's own; needs
            `out`.

    Returns:
        The content of metrics.json.

    Raises:
        CheckpointError: the run is not trained, or its readers have other weights than it was
            trained for. ConfigError: `out` cannot be written to or belongs to the run, no report
            can be written there, or a reader cannot score the answers. TrainingError: the run
            folder is in use, or cannot be written to.
    """
    folder = RunFolder(run_dir)
    if not folder.is_trained:
        raise CheckpointError(
            f"{run_dir} holds no trained model; train it first (python -m latentwire_fast.train), "
            "or resume it with the same command if it was stopped"
        )
    if best and not folder.best_model.exists():
        raise CheckpointError(
            f"{run_dir} holds no {folder.best_model.name}; it is kept where the configuration has "
            "`validation`"
        )
    config = with_assignments(
        read_run_config(run_dir), assignments, reader_options=reader_options, trained=True
    )
    made_by = command(
        "latentwire_fast.evaluate",
        folder.name,
        fresh_seed=fresh_seed,
        examples=count,
        out=out and out.name,
        best=best,
        dtype=dtype,
        set=assignments,
        reader_options=reader_options,
    )
    if out is None:
        with RunLock(run_dir):  # only the run's own report goes there
            _check_eval_dir(folder.eval)
            metrics, results = _evaluate(
                folder, config, fresh_seed, count, progress, device=device, dtype=dtype
            )
            metrics["run"]["command"] = made_by
            _write(folder, metrics, results)
        return metrics
    _check_out(folder, out)
    metrics, _ = _evaluate(
        folder, config, fresh_seed, count, progress, device=device, dtype=dtype, best=best
    )
    metrics["run"]["command"] = made_by
    write_atomically(out, json.dumps(metrics, indent=2) + "\n")
    return metrics


def stored_metrics(run_dir: Path) -> dict[str, Any] | None:
    """metrics.json of the run's own report, if this code made it of this configuration."""
    try:
        metrics: dict[str, Any] = json.loads(RunFolder(run_dir).metrics.read_text())
        recorded = [metrics["run"][key] for key in ("config_sha256", "commit", "versions")]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    now = [config_hash(read_run_config(run_dir)), commit(), versions()]
    return metrics if recorded == now else None


def _check_out(folder: RunFolder, out: Path) -> None:
    """Raise now, rather than after the evaluation, unless metrics can be written to `out`."""
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ConfigError(f"cannot write {out}: {out.parent} is no folder that can be written to")
    if out.exists() and not out.is_file():  # a device would be replaced by a file
        raise ConfigError(f"cannot write {out}: it is no file; give the path of one")
    if folder.owns(out):
        raise ConfigError(
            f"{out} belongs to the run; choose another name, or leave --out away to write the "
            "run's own report"
        )


def _check_eval_dir(folder: Path) -> None:
    """Raise now, rather than after the evaluation, if something else is where the report goes."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder, the report goes there; move it away")


def _evaluate(
    folder: RunFolder,
    config: RunConfig,
    fresh_seed: int | None,
    count: int | None,
    progress: bool,
    *,
    device: torch.device | None,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    best: bool = False,
) -> tuple[dict[str, Any], EvaluationResults]:
    """The content of metrics.json, and what it was made from."""
    if config.threads:
        torch.set_num_threads(config.threads)
    start = time.perf_counter()
    device = device or PartialState().device  # as in training: the GPU where there is one
    gc.collect()  # what a training in this process leaves is in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = Interlingua.from_pretrained(folder.best_model if best else folder.model).to(device)
    _check_settings(config, model, folder)
    readers = load_readers(config.readers, device, dtype=dtype)
    if dtype is not None:
        config = with_overrides(config, dtype=dtype)  # what the results are of
    limit = ContextLimit(readers, config.data.max_context_tokens)
    examples = heldout_examples(config.data, count=count, seed=fresh_seed, keep=limit.fits)
    source = config.data.eval_source or f"{config.data.source} (held out)"
    limit.report(source)
    warn_of_scripts(examples, source=source)
    check_contexts(examples, mode=config.mode, source=source)
    check_answers(examples, readers, source=source)
    paragraphs = continuation_texts(config, readers)
    evaluator = Evaluator(
        config,
        model,
        readers,
        examples,
        training_texts=training_texts(config, config.evaluation.pca_texts),
        dictionary_texts=dictionary_texts(config),
        progress=progress,
    )
    measured = _truncated(evaluator)
    results = evaluator.run()
    measured |= results.metrics()
    if facts := model.encoder.facts():
        measured["encoder"] = facts
    measured["collapse"] = measure_collapse(model, readers, results)
    if folder.validation.exists():
        measured["validation"] = read_json(folder.validation, error=CheckpointError)
    if paragraphs:
        measured["continuation"] = measure_continuation(
            paragraphs, model, readers, config, progress=progress
        )
    diagnostics = read_records(folder.diagnostics)
    seconds = diagnostics[-1]["seconds"] if diagnostics else 0.0
    seed = config.data.eval_seed if fresh_seed is None else fresh_seed
    run = run_record(config, name=folder.name, device=device, eval_seed=seed)
    run["wall_seconds"] = seconds + time.perf_counter() - start
    run["vocab_sizes"] = {name: r.embedding.weight.shape[0] for name, r in readers.items()}
    return {"schema_version": 1, "run": run, **measured}, results


def _check_settings(config: RunConfig, model: Interlingua, folder: RunFolder) -> None:
    """Raise unless the model is what the configuration says: the scores name its settings."""
    same = {
        "mode": config.mode == model.mode,
        "encoder": config.encoder.allows(model.encoder_config),
        "bottleneck": config.bottleneck == model.bottleneck_config,
        "attachments": config.attachments == model.attachment_configs,
        "private_slots": config.private_slots == model.slots.private,
    }
    differ = [name for name, is_same in same.items() if not is_same]
    if differ:
        raise CheckpointError(
            f"{folder.config} is not of the model beside it (differs in "
            f"{', '.join(differ)}); put back the file that the training wrote"
        )


def dictionary_texts(config: RunConfig) -> list[str] | str:
    """Training texts for the dictionary of zstd, or why there are none: an evaluation has no other
    need of the training data, which may not be here."""
    if why_no_zstd():
        return ""
    try:
        examples = training_examples(config, DICTIONARY_TEXTS)
    except DataError as error:
        logger.warning("zstd gets no dictionary: %s", error)
        return f"the training data cannot be read ({error})"
    return [replaced_text(e.context, e.question, mode=config.mode) for e in examples]


def _truncated(evaluator: Evaluator) -> dict[str, Any]:
    """The `truncated` entry of metrics.json: how much of the text no latent holds. There is none
    where the encoder reads all of it."""
    texts = ((e.context, e.question) for e in evaluator.examples)
    model = evaluator.model
    if evaluator.config.scored_chunk_length is not None:
        return {}
    truncation = measure_truncation(model.encoder, texts, mode=model.mode)
    if not truncation.cut:
        return {}
    logger.warning("held-out data: %s; scores and text sizes are of the whole text", truncation)
    return {"truncated": {"examples": truncation.cut, "text_share": truncation.share}}


def rewrite_report(folder: RunFolder) -> None:
    """The run's report again, from the files of its evaluation: with what came after it."""
    lines = folder.predictions.read_text(encoding="utf-8").splitlines()
    write_report(
        folder.eval,
        metrics=read_json(folder.metrics, error=CheckpointError),
        predictions=[json.loads(line) for line in lines],
        diagnostics=read_records(folder.diagnostics),
        config=to_json(read_run_config(folder.path)),
    )


def _write(folder: RunFolder, metrics: dict[str, Any], results: EvaluationResults) -> None:
    """The files of `RUN/eval`; metrics.json is the last."""
    records = results.records()
    folder.eval.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(folder.predictions, lines)
    write_report(
        folder.eval,
        metrics=metrics,
        predictions=records,
        diagnostics=read_records(folder.diagnostics),
        config=to_json(results.config),
    )
    write_atomically(folder.model_card, model_card(results.config, metrics))
    write_atomically(folder.metrics, json.dumps(metrics, indent=2) + "\n")
