"""The report of an evaluation: `report.html`, `report.md` with its figures, and `metrics.csv`.

`metrics` is what `metrics.json` holds; `extra_scores.py` adds a few scores from the predictions,
`intervals.py` the bounds of scores that are plain means there.
Scores are shares of 1, each a number or `{"mean", "low", "high"}`; hypotheses that compare F1 are
differences of such shares, the others ratios. `run.vocab_sizes` (reader name to V), where present,
lets the report check that the text baseline's NLL is below ln V. Whatever is missing prints as not
measured.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2

from latentwire_fast.evaluation.methods.base import methods_by_bits
from latentwire_fast.evaluation.report.contents import sections
from latentwire_fast.evaluation.report.extra_scores import Means, extra_scores
from latentwire_fast.evaluation.report.figures import accuracy_figure, learning_figure
from latentwire_fast.evaluation.report.formatting import measured
from latentwire_fast.evaluation.report.intervals import Bootstrap, with_intervals
from latentwire_fast.evaluation.report.patterns import stored_patterns
from latentwire_fast.evaluation.report.text_bytes import COMPRESSORS
from latentwire_fast.evaluation.report.view import build_view
from latentwire_fast.files.atomic import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
_CSV_HEADER = ("part", "method", "metric", "mean", "low", "high")


def write_report(
    eval_dir: Path,
    *,
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    diagnostics: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> None:
    """Write the report files into `eval_dir`; the same input gives the same bytes.

    Args:
        eval_dir: created when missing; gets report.html (self-contained), report.md, metrics.csv
            and figures/*.png. The pattern_*.json in it are shown too.
        metrics: the content of metrics.json.
        predictions: the records of predictions.jsonl.
        diagnostics: the records of the run's diagnostics.jsonl; may be empty.
        config: the run's configuration.

    Raises:
        OSError: the disk refused; each file is the old one or the new one.
    """
    bootstrap = Bootstrap(predictions, seed=config.get("seed") or 0)
    metrics = with_intervals(metrics, predictions, bootstrap)
    extra = extra_scores(predictions, bootstrap)
    patterns = stored_patterns(eval_dir)
    view = build_view(metrics, predictions, diagnostics, config, extra=extra, patterns=patterns)
    validations = (metrics.get("validation") or {}).get("validations") or []
    drawn = {
        "accuracy": accuracy_figure(metrics),
        "learning": learning_figure(diagnostics, validations),
    }
    figures = {name: png for name, png in drawn.items() if png is not None}
    (eval_dir / "figures").mkdir(parents=True, exist_ok=True)
    for name, png in figures.items():
        (eval_dir / "figures" / f"{name}.png").write_bytes(png)
    embedded = {
        name: "data:image/png;base64," + base64.b64encode(png).decode()
        for name, png in figures.items()
    }
    linked = {name: f"figures/{name}.png" for name in figures}
    templates = _environment()
    for file, images in (("report.html", embedded), ("report.md", linked)):
        content = {**view, "figures": images, "sections": sections(view, images)}
        text = templates.get_template(f"{file}.j2").render(content)
        write_atomically(eval_dir / file, text)
    write_atomically(eval_dir / "metrics.csv", metrics_csv(metrics, extra))


def metrics_csv(metrics: Mapping[str, Any], extra: Means) -> str:
    """The scores, sizes and hypotheses of `metrics.json`, and the extra scores, as one tidy
    table."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for part, method, metric, value in chain(_rows(metrics), _extra_rows(extra)):
        found = measured(value)
        if found is not None:
            writer.writerow(["" if v is None else v for v in (part, method, metric, *found)])
    return buffer.getvalue()


def _rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    by_bits = methods_by_bits()
    for reader, methods in (metrics.get("readers") or {}).items():
        for method, scores in methods.items():
            if method in by_bits:
                for bits, of_width in scores.items():
                    for metric, value in of_width.items():
                        yield reader, f"{method.removesuffix('_bits')}_{bits}_bits", metric, value
            else:
                for metric, value in (scores or {}).items():
                    yield reader, method, metric, value
    for reader, others in (metrics.get("latent_minus") or {}).items():
        for other, scores in others.items():
            for metric, value in scores.items():
                yield reader, f"latent_minus_{other}", metric, value
    for reader, entry in ((metrics.get("continuation") or {}).get("readers") or {}).items():
        for way, value in entry["nll_per_token"].items():
            yield reader, f"continuation_{way}", "nll_per_token", value
        for way, value in entry["latent_minus"].items():
            yield reader, f"continuation_latent_minus_{way}", "nll_per_token", value
    for name, entry in (metrics.get("sets") or {}).items():
        for reader, methods in entry["readers"].items():
            for method, scores in methods.items():
                for metric, value in scores.items():
                    yield f"{reader} on {name}", method, metric, value
    for metric, value in (metrics.get("joint") or {}).items():
        yield "joint", "", metric, value
    sizes = metrics.get("bytes") or {}
    for bits, value in (sizes.get("payload_mean") or {}).items():
        yield "bytes", f"latent_{bits}_bits", "payload_mean", value
    for reader, alone in (sizes.get("payload_alone_mean") or {}).items():
        for bits, value in alone.items():
            yield "bytes", f"latent_{bits}_bits_for_{reader}", "payload_mean", value
    for metric in COMPRESSORS:
        yield "bytes", "text", metric, sizes.get(metric)
    for reader, value in (sizes.get("text_coded_mean") or {}).items():
        yield "bytes", f"text_coded_by_{reader}", "text_coded_mean", value
    for reader, entry in ((metrics.get("coded_text") or {}).get("readers") or {}).items():
        for way, value in ((entry or {}).get("first_token_ms_p50") or {}).items():
            yield reader, f"coded_text_{way}", "first_token_ms_p50", value
    for name, found in (metrics.get("hypotheses") or {}).items():
        value = {"mean": found.get("value"), "low": found.get("low"), "high": found.get("high")}
        yield "hypotheses", name, str(found.get("verdict")), value


def _extra_rows(extra: Means) -> Iterator[tuple[str, str, str, Any]]:
    for reader, methods in extra.items():
        for method, means in methods.items():
            for metric, value in means.items():
                yield reader, method, metric, value


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _escape_markdown
    return environment


def _escape_markdown(text: Any) -> str:
    """Text from outside as it stands, also inside a table cell: one line, no markup."""
    line = " ".join(str(text).split())
    for character in "\\`*_[]<>|#~":
        line = line.replace(character, "\\" + character)
    return line
