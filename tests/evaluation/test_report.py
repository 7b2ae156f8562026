"""The report from synthetic evaluations: everything in it, nothing missing breaks it."""

from __future__ import annotations

import base64
import copy
import csv
import io
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.evaluation.continuation import WAYS
from latentwire_fast.evaluation.report import figures, write_report
from latentwire_fast.evaluation.report.extra_scores import EXTRA_SCORES, extra_scores
from latentwire_fast.evaluation.report.figures import accuracy_figure, learning_figure
from latentwire_fast.evaluation.report.formatting import (
    MISSING,
    Cell,
    cell,
    measured,
    number,
    percent,
    ratio,
)
from latentwire_fast.evaluation.report.hypothesis_rows import hypothesis_row
from latentwire_fast.evaluation.report.sanity_checks import find_warnings
from latentwire_fast.evaluation.report.shown_examples import choose_examples
from latentwire_fast.evaluation.report.view import build_view, headline
from latentwire_fast.registry import METHODS

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
BITS = ("16", "8", "6", "4")
PAYLOADS = {"16": 400.0, "8": 220.0, "6": 172.0, "4": 124.0}
READERS = {"llama": 0.985, "qwen": 0.96}
F1_SHARE = {  # of the reader's text F1
    "text": 1.0,
    "latent": 0.95,
    "token_budget": 0.04,
    "token_budget_question": 0.06,
    "byte_budget": 0.41,
    "closed_book": 0.03,
    "shuffled_latent": 0.02,
    "first_words": 0.02,
    "embedding_replay": 1.0,
}


def interval(value: float, spread: float = 0.03) -> dict[str, float]:
    return {"mean": value, "low": max(0.0, value - spread), "high": min(1.0, value + spread)}


CODED_MS = {"payload": 5.2, "unpacking": 96.0, "coded_text": 104.0}


def make_metrics(*, mode: str = "context", examples: int = 500) -> dict[str, Any]:
    """The metrics of two readers, as an evaluation writes them."""
    readers: dict[str, Any] = {}
    for name, text in READERS.items():
        readers[name] = {
            method: {
                "f1": interval(share * text),
                "em": interval(share * text * 0.97),
                "first_token_top1": interval(share * text),
                "first_token_top5": interval(min(1.0, share * text * 1.02)),
                "nll_per_token": {"mean": 3 - 2.9 * share, "low": 2.9 - 2.9 * share, "high": 3.2},
                "diversity": interval(0.6 * share + 0.1),
                "prefix_positions_mean": 57.3 if method == "text" else 12,
                "prefill_ms_p50": 3.91 if method == "text" else 2.2,
            }
            for method, share in F1_SHARE.items()
        }
        for key, share in (("latent_bits", 0.95), ("byte_budget_bits", 0.6)):
            readers[name][key] = {
                bits: {
                    "f1": interval(text * (share - 0.05 if bits == "4" else share)),
                    "em": interval(text * (share - 0.05)),
                }
                for bits in BITS
            }
    return {
        "schema_version": 1,
        "run": {
            "name": "demo",
            "preset": "testbed",
            "mode": mode,
            "seed": 0,
            "commit": "4a191bd0c0ffee",
            "config_sha256": "9f" * 32,
            "device": "cpu (2 threads)",
            "versions": {"torch": "2.13.0", "python": "3.11.7", "latentwire-fast": "0.1.0"},
            "wall_seconds": 534.2,
            "vocab_sizes": {"llama": 900, "qwen": 1000},
        },
        "examples": examples,
        "latent": {"M": 12, "d_z": 16, "bits": 6, "group_size": 32},
        "bytes": {
            "text_utf8_mean": 236.4,
            "text_brotli_mean": 151.7,
            "text_zlib_mean": 170.2,
            "text_zstd_mean": 165.1,
            "text_zstd_dictionary_mean": None,
            "text_coded_mean": {"llama": 12.34, "qwen": None},
            "payload_mean": dict(PAYLOADS),
        },
        "readers": readers,
        "joint": {"f1": 0.957, "best_single_f1": 0.936, "agreement": 0.88, "oracle_f1": 0.971},
        "hypotheses": {
            "H1": {"value": -0.05, "low": -0.07, "high": -0.03, "bar": -0.02, "verdict": "fail"},
            "H2": {"value": 0.88, "low": 0.85, "high": 0.91, "bar": 0.03, "verdict": "pass"},
            "H3": {"value": 1.04, "low": 0.98, "high": 1.11, "bar": 1.05, "verdict": "pass"},
            "H4": {"value": 0.021, "low": 0.004, "high": 0.04, "bar": 0.015, "verdict": "pass"},
            "H5": {"value": 1.78, "low": 1.7, "high": 1.85, "bar": 1.0, "verdict": "pass"},
            "H6": {"value": 1.13, "low": 1.12, "high": 1.15, "bar": 1.0, "verdict": "fail"},
            "H7": {
                "value": None,
                "low": None,
                "high": None,
                "bar": -0.05,
                "verdict": "not measured",
            },
            "H8": {
                **{"value": 10.1, "low": 9.8, "high": 10.4, "bar": 1.0, "verdict": "fail"},
                "bits": 4,
                "first_token_ms_p50": {"llama": dict(CODED_MS)},
            },
        },
        "coded_text": {
            "readers": {
                "llama": {
                    "bits_per_byte": 0.418,
                    "tokens_mean": 41.2,
                    "lost": 3,
                    "sample": {
                        **{"examples": 8, "decoded_equal": 7},
                        **{"bytes_mean": 12.9, "information_mean": 12.31},
                    },
                    "first_token_ms_p50": dict(CODED_MS),
                },
                "qwen": None,  # it has no positions for the texts
            },
            "zstd_dictionary": None,
            "not_measured": {"zstd_dictionary": "the training data cannot be read"},
        },
    }


def make_predictions(count: int = 60) -> list[dict[str, Any]]:
    """Per-example records in which the latent is wrong on every seventh example."""
    rng = random.Random(0)
    records = []
    examples = make_examples(count, seed=3)
    for i, example in enumerate(examples):
        gold = example.answers[0]

        def scored(text: str, gold: str = gold) -> dict[str, Any]:
            correct = float(text == gold)
            return {"prediction": text, "em": correct, "f1": correct}

        other = examples[(i + 1) % count].answers[0]
        latent = other if i % 7 == 0 else gold
        text = {"text": gold, "embedding_replay": gold, "latent": latent, "byte_budget": other}
        floors = {"token_budget": "", "closed_book": "baker", "shuffled_latent": other}
        readers = {
            name: {
                **{method: scored(answer) for method, answer in (text | floors).items()},
                "latent_bits": {bits: scored(latent if bits != "4" else other) for bits in BITS},
            }
            for name in READERS
        }
        records.append(
            {
                "id": example.id,
                "question": example.question,
                "answers": list(example.answers),
                "context": example.context,
                "text_utf8_bytes": len(example.context.encode()),
                "text_brotli_bytes": 150 + rng.randint(-9, 9),
                "payload_bytes": {bits: int(size) for bits, size in PAYLOADS.items()},
                "readers": readers,
                "joint": scored(latent) | {"scores": [-0.1, -0.4]},
            }
        )
    return records


def make_diagnostics(steps: int = 1500) -> list[dict[str, Any]]:
    """Three stages of a training that works."""
    rng = random.Random(1)
    records = []
    for step in range(0, steps, 10):
        share = step / steps
        stage = "pretrain" if share < 0.3 else "answer" if share < 0.8 else "quantise"
        noise = rng.uniform(0.9, 1.1)
        if stage == "pretrain":
            losses = {"autoencode/llama": 0.9 + 3 * math.exp(-9 * share) * noise}
            losses["autoencode/qwen"] = losses["autoencode/llama"] * 1.1
            losses["continue/llama"] = 2.2 + 2 * math.exp(-5 * share) * noise
            accuracy = {}
        else:
            losses = {
                f"answer/{name}": 2.5 * math.exp(-4 * (share - 0.3)) * noise for name in READERS
            }
            accuracy = {
                n: min(1, a * (1 - math.exp(-5 * (share - 0.3)))) for n, a in READERS.items()
            }
        records.append(
            {
                "step": step,
                "stage": stage,
                "loss": sum(losses.values()),
                "losses": losses,
                "latent": {
                    "pairwise_cosine": 0.4,
                    "effective_rank": 20 * (1 - math.exp(-4 * share)),
                },
                "accuracy": accuracy,
            }
        )
    return records


CONFIG = {
    "preset": "testbed",
    "mode": "context",
    "seed": 0,
    "note": "</pre><script>alert(1)</script>",
}


@pytest.fixture(scope="module", autouse=True)
def _small_figures() -> Iterator[None]:
    """Drawing takes most of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_report(
        folder,
        metrics=make_metrics(),
        predictions=make_predictions(),
        diagnostics=make_diagnostics(),
        config=CONFIG,
    )
    return folder


class _Checker(HTMLParser):
    """Tags closed in order, and what the page refers to."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        found = [v or "" for k, v in attrs if k in ("src", "href")]
        self.sources += [source for source in found if not source.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files(written: Path) -> None:
    found = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
    assert found == {
        "report.html",
        "report.md",
        "metrics.csv",
        "figures/accuracy.png",
        "figures/learning.png",
    }


def test_html_is_well_formed_and_self_contained(written: Path) -> None:
    html = (written / "report.html").read_text()
    checker = _Checker()
    checker.feed(html)
    assert not checker.open
    assert checker.scripts == 0
    assert len(checker.sources) == 2
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in checker.sources)
    embedded = base64.b64decode(checker.sources[0].removeprefix(prefix))
    assert embedded == (written / "figures/accuracy.png").read_bytes()
    assert "url(" not in html
    assert "@import" not in html


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_both_forms_say_it_all(written: Path, file: str) -> None:
    text = (written / file).read_text()
    for method in F1_SHARE:
        assert METHODS[method].label in text
    for expected in (
        "One payload of 172 bytes at 6 bits stands in for 236 bytes of text (152 after brotli)",
        "a claim about compression",
        "llama answers with F1 93.6 from it, 98.5 from the text",
        "larger than the text after brotli",
        "Agreement",
        f"{MINUS}5.0",  # H1 in points
        f"{MINUS}7.0 to {MINUS}3.0",
        "Fails over the whole interval.",
        "Holds on average, but the interval holds the bar",
        "Not measured: it needs a run that adds a reader.",
        "4a191bd0c0ffee",
        "python -m latentwire_fast.evaluate --run runs/demo",
        "torch 2.13.0",
        "testbed-heldout-3-1",
        "testbed-heldout-3-0",
        "(empty)",
    ):
        assert expected in text, expected
    words = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"\bnan\b|\bNone\b", words)


def test_pure_mode_claims_no_compression(tmp_path: Path) -> None:
    write_report(
        tmp_path, metrics=make_metrics(mode="pure"), predictions=[], diagnostics=[], config={}
    )
    for file in ("report.html", "report.md"):
        text = (tmp_path / file).read_text()
        assert "It says nothing about compression" in text
        assert "a claim about compression" not in text


def test_markdown_tables_are_rectangular(written: Path) -> None:
    block: list[int] = []
    tables = 0
    for line in [*(written / "report.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            assert len(set(block)) == 1, line
            assert len(block) > 2
            tables += 1
            block = []
    assert tables >= 11
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (written / "report.md").read_text())
    assert images == ["figures/accuracy.png", "figures/learning.png"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, written: Path) -> None:
    write_report(
        tmp_path,
        metrics=make_metrics(),
        predictions=make_predictions(),
        diagnostics=make_diagnostics(),
        config=CONFIG,
    )
    for path in written.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes()


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    predictions = make_predictions(2)
    for record in predictions:
        record["context"] = "<script>x</script> | a *b*\n# c"
        record["question"] = "[q](http://x)"
    metrics = make_metrics()
    metrics["run"]["name"] = "<b>run</b>"
    write_report(tmp_path, metrics=metrics, predictions=predictions, diagnostics=[], config=CONFIG)
    html, text = ((tmp_path / f).read_text() for f in ("report.html", "report.md"))
    assert "<script" not in html
    assert "<b>run" not in html
    assert r"\<script\>x\</script\> \| a \*b\* \# c" in text
    assert r"\[q\](http://x)" in text


def test_csv_holds_every_number(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "metrics.csv").read_text())))
    found = {(r["part"], r["method"], r["metric"]): r for r in rows}
    latent = found["llama", "latent", "f1"]
    assert float(latent["mean"]) == pytest.approx(0.95 * 0.985)
    assert float(latent["low"]) < float(latent["mean"]) < float(latent["high"])
    assert float(found["qwen", "latent_4_bits", "f1"]["mean"]) == pytest.approx(0.9 * 0.96)
    assert found["llama", "text", "prefix_positions_mean"]["low"] == ""
    assert float(found["bytes", "latent_6_bits", "payload_mean"]["mean"]) == 172
    assert float(found["joint", "", "oracle_f1"]["mean"]) == 0.971
    assert found["hypotheses", "H1", "fail"]["mean"] == "-0.05"
    assert ("hypotheses", "H7", "not measured") not in found
    assert float(found["llama", "latent", "accuracy"]["mean"]) == pytest.approx(51 / 60)
    assert len(rows) == 2 * (9 * 8 + 2 * 4 * 2) + 4 + 8 + 7 + 2 * 7 * 4 + 4


def test_extra_scores_by_hand() -> None:
    def record(prediction: str, answers: list[str], rank: float | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"prediction": prediction}
        if rank is not None:
            entry["first_token_reciprocal_rank"] = rank
        methods = {"text": entry, "first_words": {"prediction": ""}, "latent_bits": {"4": entry}}
        return {"answers": answers, "readers": {"llama": methods}}

    records = [
        record("the cat sat", ["the cat ran off", "a dog"], 0.5),
        record(" B", ["b", "c"], 0.0),
    ]
    found = extra_scores(records)
    assert set(found) == {"llama"}
    assert set(found["llama"]) == {"text", "first_words"}
    text = found["llama"]["text"]
    assert text["rouge1"] == pytest.approx((4 / 7 + 1) / 2)
    assert text["rouge2"] == pytest.approx((2 / 5 + 0) / 2)
    assert text["accuracy"] == 0.5
    assert text["mrr_at_10"] == 0.25
    assert "mrr_at_10" not in found["llama"]["first_words"], "it ranks nothing"
    assert set(text) == set(EXTRA_SCORES)


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_extra_scores_are_shown(written: Path, file: str) -> None:
    text = (written / file).read_text()
    for column in EXTRA_SCORES.values():
        assert column in text


# --- missing and odd values -----------------------------------------------------------------------


def _without(path: tuple[str, ...]) -> dict[str, Any]:
    metrics = make_metrics()
    target = metrics
    for key in path[:-1]:
        target = target[key]
    del target[path[-1]]
    return metrics


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"readers": {}, "bytes": {}, "run": {}},
        *(_without((key,)) for key in make_metrics() if key != "schema_version"),
        _without(("bytes", "payload_mean")),
        _without(("bytes", "text_brotli_mean")),
        _without(("readers", "llama", "latent_bits")),
        _without(("readers", "llama", "text")),
        _without(("readers", "qwen", "latent")),
        _without(("readers", "qwen", "latent", "f1")),
        _without(("hypotheses", "H1")),
        _without(("hypotheses", "H2", "low")),
    ],
)
def test_what_is_missing_prints_as_not_measured(tmp_path: Path, metrics: dict[str, Any]) -> None:
    write_report(tmp_path, metrics=metrics, predictions=[], diagnostics=[], config={})
    assert MISSING in (tmp_path / "report.html").read_text()
    assert "not measured" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "drop", ["readers", "joint", "payload_bytes", "context", "text_utf8_bytes"]
)
def test_partial_records(tmp_path: Path, drop: str) -> None:
    predictions = make_predictions(4)
    for record in predictions:
        del record[drop]
    diagnostics = [{"step": 0, "stage": "a", "loss": 2.0}, {"step": 5, "loss": None}]
    write_report(
        tmp_path,
        metrics=make_metrics(),
        predictions=predictions,
        diagnostics=diagnostics,
        config={},
    )
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_unknown_methods_are_shown(tmp_path: Path) -> None:
    metrics = make_metrics()
    metrics["readers"]["llama"]["pca_latent"] = {"f1": 0.5}
    rows = build_view(metrics, [], [], {}, extra={})["readers"][0]["rows"]
    assert rows[-1]["label"] == "pca latent"
    assert rows[-1]["cells"][0].text == "50.0"


def test_a_single_reader() -> None:
    metrics = make_metrics()
    del metrics["readers"]["qwen"]
    assert "for 1 frozen reader: llama answers" in headline(metrics)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("H1", {"value": 0.0, "low": -0.01, "high": 0.01}, "prefix is not 4"),
        ("H5", {"verdict": "fail"}, "the payload is not smaller than the text"),
        ("H6", {"value": 0.8, "low": 0.7, "high": 0.9}, "no bit width keeps 95%"),
        ("H6", {}, "Fails over the whole interval"),
        ("H2", {"verdict": "fail", "low": 0.0, "value": 0.02}, "more examples may overturn"),
        ("H3", {"low": None}, "Holds by the point estimate"),
        ("H3", {"verdict": "not measured", "value": None}, "readers that do the task from text"),
    ],
)
def test_verdicts_are_explained(key: str, change: dict[str, Any], message: str) -> None:
    metrics = make_metrics()
    metrics["hypotheses"][key] |= change
    assert message in hypothesis_row(metrics, key)["explanation"]


def test_values_name_their_circumstances() -> None:
    metrics = make_metrics()
    metrics["hypotheses"]["H1"]["position_ratio"] = 4.78
    metrics["hypotheses"]["H6"]["bits"] = 4
    h1, h6 = (hypothesis_row(metrics, key)["quantity"] for key in ("H1", "H6"))
    assert h1 == f"latent F1 minus text F1 at 4.8{TIMES} fewer positions"
    assert h6 == "payload bytes over brotli bytes at 4 bits"
    h8 = hypothesis_row(metrics, "H8")["quantity"]
    assert h8 == (
        "payload bytes over bytes of the text coded by a reader at 4 bits; to the first token: "
        "llama 5 ms against 104 ms"
    )


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_the_same_text_in_every_form(written: Path, file: str) -> None:
    text = (written / file).read_text()
    text = re.sub(r"\s*</td><td>\s*", " | ", text)
    for row in (
        f"text, UTF-8 | 236 | 1.00{TIMES} | 8.00",
        f"text, zlib 9 | 170 | 0.72{TIMES} | 5.76",
        f"text, brotli 11 | 152 | 0.64{TIMES} | 5.13",
        f"text, coded by llama | 12.3 | 0.05{TIMES} | 0.42",
        f"text, coded by qwen | {MISSING} | {MISSING} | {MISSING} | not measured",
        f"llama | 5.2 | 104.0 | 96.0 | 20{TIMES} | 41",  # what each costs
    ):
        assert row in text
    assert "the training data cannot be read" in text
    assert "7 came back the same, from 12.9 bytes" in text
    assert "loses something of 3 of the texts" in text


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_the_commands_reproduce_the_run(tmp_path: Path, file: str) -> None:
    """A preset's name only where the run had no other setting."""

    def commands(config: Any, **run: Any) -> str:
        metrics = make_metrics()
        metrics["run"] |= {"preset": "testbed", "name": "mine", **run}
        write_report(tmp_path, metrics=metrics, predictions=[], diagnostics=[], config=config)
        return (tmp_path / file).read_text()

    preset = to_json(PRESETS["testbed"]())
    text = commands(preset, commit="0123abc")
    assert "git checkout 0123abc\npython -m latentwire_fast.train testbed --run runs/mine" in text
    text = commands({**preset, "seed": 7}, commit="0123abc+changes")
    assert "git checkout 0123abc\n# with the changes" in text
    assert "python -m latentwire_fast.train config.json --run runs/mine" in text
    assert "latentwire_fast.train" in commands({}, preset="custom", commit=None)


def test_values() -> None:
    assert measured(None) is measured({"mean": None, "low": 0.1}) is None
    assert measured(0.5) == (0.5, None, None)
    assert percent({"mean": 0.755, "low": 0.7, "high": 0.81})[:2] == ("75.5", "70.0 to 81.0")
    assert cell(-0.021, scale=100, signed=True) == Cell(f"{MINUS}2.1")
    assert cell({"mean": 0.021, "low": 0, "high": None}, scale=100, signed=True) == Cell("+2.1")
    assert number(-0.04, digits=1) == number(0.04, digits=1, signed=True) == "0.0"
    assert number(12345.6, digits=0) == "12,346"
    assert ratio(172, 236.4) == f"0.73{TIMES}"
    assert ratio(172, 0) == ratio(None, 2) == MISSING


# --- examples, warnings, figures ------------------------------------------------------------------


def test_examples_show_where_the_latent_matters() -> None:
    predictions = make_predictions(30)
    for name in READERS:
        predictions[1]["readers"][name]["token_budget"] = {"prediction": "x", "em": 1.0, "f1": 1.0}
        predictions[7]["readers"][name]["text"] = {"prediction": "x", "em": 0.0, "f1": 0.0}
    chosen = choose_examples(predictions, make_metrics())
    assert [s["id"][-2:].strip("-") for s in chosen["good"]] == ["2", "3", "4"]
    assert [s["id"][-2:].strip("-") for s in chosen["bad"]] == ["0", "14", "21"]
    labels = [row["label"] for row in chosen["bad"][0]["rows"]]
    assert "Latent" in labels
    assert "Latent, 6 bits" not in labels  # the run's own width is the row `Latent`
    assert chosen["bad"][0]["rows"][labels.index("Token budget")]["answers"][0] == {
        "text": "(empty)",
        "grade": "wrong",
    }


def test_long_contexts_are_clipped() -> None:
    predictions = make_predictions(2)[1:]
    predictions[0]["context"] = "word " * 1000
    sample = choose_examples(predictions, make_metrics())["good"][0]
    assert len(sample["context"]) + sample["clipped"] == 5000


def test_babbling_answers_are_clipped() -> None:
    predictions = make_predictions(2)[1:]
    predictions[0]["readers"]["llama"]["text"] = {"prediction": "so " * 500, "em": 0.0, "f1": 0.1}
    answer = choose_examples(predictions, make_metrics())["good"][0]["rows"][0]["answers"][0]
    assert answer["grade"] == "partial"
    assert len(answer["text"]) < 200


def test_a_sound_run_has_no_warnings() -> None:
    metrics = make_metrics()
    metrics["latent"]["bits"] = 4
    assert find_warnings(metrics, make_predictions(), make_diagnostics()) == []


def _broken(*path: str, value: Any) -> dict[str, Any]:
    metrics = copy.deepcopy(make_metrics())
    target = metrics
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return metrics


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (make_metrics(examples=40), "Only 40 examples"),
        (
            _broken("truncated", value={"examples": 12, "text_share": 0.0341}),
            "12 of 500 texts are longer than the encoder reads: 3.41% of all text",
        ),
        (
            _broken("bytes", "payload_mean", "6", value=16384),
            "16,384 bytes) is larger than the text",
        ),
        (make_metrics(), "larger than the text after brotli (152 bytes)"),
        (
            _broken("readers", "llama", "text", "nll_per_token", value=13.7),
            "llama: NLL per token of the text baseline is 13.70, above ln V = 6.80",
        ),
        (_broken("readers", "qwen", "text", "f1", value=0.3), "does not master the task"),
        (
            _broken("readers", "qwen", "shuffled_latent", "f1", value=0.4),
            "qwen: the shuffled latent scores F1 40.0, above closed book (2.9)",
        ),
        (
            _broken("readers", "qwen", "zero_latent", value={"f1": 0.3}),
            "the zero latent scores F1 30.0",
        ),
    ],
)
def test_warnings_from_scores(metrics: dict[str, Any], message: str) -> None:
    assert message in "\n".join(find_warnings(metrics, [], []))


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("latent", "baker", "only 1.7% of the latent's predictions are distinct"),
        ("latent", " ", "llama: 100.0% of the latent's answers are empty"),
        ("embedding_replay", "baker", "embedding replay differs from text on 60 of 60"),
    ],
)
def test_warnings_from_predictions(method: str, answer: str, message: str) -> None:
    predictions = make_predictions()
    for record in predictions:
        record["readers"]["llama"][method]["prediction"] = answer
    assert message in "\n".join(find_warnings(make_metrics(), predictions, []))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"latent": {"effective_rank": 1.2, "pairwise_cosine": 0.2}}, "effective rank 1.2"),
        ({"latent": {"effective_rank": 9.0, "pairwise_cosine": 0.99}}, "cosine 0.990"),
        ({"losses": {"autoencode/llama": 2.05}}, "ends at 2.05: it did not leave its plateau"),
    ],
)
def test_warnings_from_training(record: dict[str, Any], message: str) -> None:
    diagnostics = [{"step": i, **record} for i in range(30)]
    assert message in "\n".join(find_warnings(make_metrics(), [], diagnostics))


def test_figures() -> None:
    for png in (accuracy_figure(make_metrics()), learning_figure(make_diagnostics())):
        assert png is not None
        assert png.startswith(b"\x89PNG")
    assert accuracy_figure(_without(("bytes",))) is None
    assert accuracy_figure({}) is None
    assert learning_figure([]) is None
    assert learning_figure([{"step": 0, "stage": "a"}]) is None


def test_differences_and_running_text_are_shown(tmp_path: Path) -> None:
    """Both formats have the latent's paired differences, and the continuation measure."""
    metrics = make_metrics()
    minus = {"mean": -0.512, "low": -0.6, "high": -0.4}
    metrics["latent_minus"] = {
        name: {"closed_book": {"nll_per_token": minus, "f1": interval(0.25)}} for name in READERS
    }
    nll = {way: {"mean": 3.25, "low": 3.0, "high": 3.5} for way in WAYS}
    entry = {"nll_per_token": nll, "latent_minus": {"nothing": minus}}
    metrics["continuation"] = {
        "source": "text=/somewhere/prose.txt.xz",
        "examples": 60,
        "payload_mean": 400.0,
        "text_utf8_mean": 321.0,
        "readers": {"llama": entry},
    }
    write_report(tmp_path, metrics=metrics, predictions=[], diagnostics=[], config={})
    for file in ("report.md", "report.html"):
        text = (tmp_path / file).read_text()
        assert f"{MINUS}0.512" in text
        assert f"{MINUS}0.600 to {MINUS}0.400" in text
        assert "+25.0" in text
        assert "Going on with a text" in text
        assert "60 paragraphs (prose.txt.xz)" in text
        assert "3.250" in text
        assert all(label in text for label in WAYS.values())
    table = (tmp_path / "report.md").read_text().splitlines()
    row = next(line for line in table if line.startswith("| Closed book |") and MINUS in line)
    assert row.count("|") == 4
    assert table[table.index(row) - 1].startswith("|---")
