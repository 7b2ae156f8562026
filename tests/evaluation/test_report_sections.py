"""The sections of a report: there where their content is, within the screen, with their sources."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.serialization import to_json
from latentwire_fast.evaluation.metrics import mean_interval
from latentwire_fast.evaluation.pipeline import rewrite_report
from latentwire_fast.evaluation.provenance import command
from latentwire_fast.evaluation.report import figures, write_report
from latentwire_fast.evaluation.report.contents import SECTIONS
from latentwire_fast.evaluation.report.figure_names import LONGEST, MANY, figure_note, shown_names
from latentwire_fast.evaluation.report.figures import accuracy_figure, learning_figure
from latentwire_fast.evaluation.report.intervals import Bootstrap, with_intervals
from latentwire_fast.files.run_folder import RunFolder

F1 = {"mean": 0.5, "low": 0.4, "high": 0.6}
EVALUATE = "python -m latentwire_fast.evaluate --run runs/mine --examples 40"
PATTERN = "python -m latentwire_fast.evaluate pattern --run runs/mine --name routing"
COSTS = {"bytes": 170.5, "gflops": 0.13, "ms": 4.0, "sender_gflops": 0.0, "sender_ms": 0.0}


def reader_entry() -> dict[str, Any]:
    return {
        "text": {"f1": F1},
        "latent": {"f1": F1, "nll_per_token": {"mean": 1.25, "low": 1.0, "high": 1.5}},
        "latent_bits": {"6": {"f1": 0.5, "em": 0.5}, "4": {"f1": 0.25, "em": 0.25}},
    }


def everything() -> dict[str, Any]:
    """Metrics with every section that does not come from other files."""
    measure = {"effective_rank": 9.0, "pairwise_cosine": 0.2, "variance_shares": [0.2, 0.1]}
    tokens = {"commonest": [["a", 0.1]], "entropy": 2.0}
    validation = {"step": 5, "scores": {"llama": {"nll": 1.0, "f1": 0.5}}}
    coded = {
        **{"bits_per_byte": 0.5, "tokens_mean": 41.0, "lost": 0},
        "sample": {
            **{"examples": 8, "decoded_equal": 8},
            **{"bytes_mean": 12.0, "information_mean": 12.0},
        },
        "first_token_ms_p50": {"payload": 5.0, "unpacking": 90.0, "coded_text": 100.0},
    }
    return {
        "run": {"name": "mine", "mode": "context", "command": EVALUATE},
        "examples": 40,
        "latent": {"M": 12, "d_z": 16, "bits": 6},
        "bytes": {"text_utf8_mean": 236.4, "payload_mean": {"6": 172.0, "4": 124.0}},
        "readers": {"llama": reader_entry()},
        "hypotheses": {},
        "joint": {"f1": 0.5, "best_single_f1": 0.5, "oracle_f1": 0.5, "agreement": 1.0},
        "coded_text": {"readers": {"llama": coded}, "zstd_dictionary": None},
        "sets": {
            "maths": {
                **{"metric": "accuracy", "examples": 40, "contexts": 40},
                "readers": {"llama": {"latent": {"accuracy": F1}}},
            }
        },
        "continuation": {
            **{"source": "prose.txt", "examples": 60, "payload_mean": 4.0, "text_utf8_mean": 3.0},
            "readers": {"llama": {"nll_per_token": {"latent": F1}, "latent_minus": {}}},
        },
        "collapse": {
            "texts": 40,
            "latent": measure,
            "readers": {
                "llama": {
                    **{"prefix": measure, "first_tokens": tokens, "gold_first_tokens": tokens},
                    **{"rms": {}, "empty_rate": 0.0},
                }
            },
        },
        "validation": {
            **{"last": validation, "best": validation, "model": "best", "metric": "nll"},
            **{"examples": 30, "ema": 0.5, "stopped_early": False},
        },
    }


def records(count: int = 40) -> list[dict[str, Any]]:
    """Half of the answers are right; two questions on each context."""
    found = []
    for i in range(count):
        right, wrong = {"f1": 1.0, "em": 1.0}, {"f1": 0.0, "em": 0.0}
        scored = right if i % 2 else wrong
        answer = {"prediction": "lamp" if i % 2 else "tea", **scored}
        bits = {"6": scored, "4": scored if i % 4 == 1 else wrong}
        found.append(
            {
                **{"id": str(i), "context": f"text {i // 2}", "question": "?", "answers": ["lamp"]},
                "readers": {"llama": {"text": answer, "latent": answer, "latent_bits": bits}},
                "joint": scored,
            }
        )
    return found


def pattern_results() -> dict[str, Any]:
    rows = [
        {"given": given, "method": "joint", "scores": {"accuracy": F1}, **COSTS}
        for given in ("text", "payload")
    ]
    return {
        **{"pattern": "routing", "questions": 1234, "validation": 20, "data": "mmlu=/a/b/data.tar"},
        "run": {"name": "mine", "command": PATTERN},
        "rows": rows,
        "facts": {"payload": {"differences": {"joint minus llama": F1}, "chosen": "llama"}},
    }


DIAGNOSTICS = [{"step": i, "stage": "a", "loss": 2.0, "seconds": 1.0} for i in range(4)]


def written(folder: Path, metrics: dict[str, Any], **files: Any) -> dict[str, str]:
    files = {"predictions": [], "diagnostics": [], "config": {}, **files}
    write_report(folder, metrics=metrics, **files)
    return {name: (folder / name).read_text() for name in ("report.html", "report.md")}


@pytest.fixture(scope="module", autouse=True)
def _small_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 30)
        yield


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "pattern_routing.json").write_text(json.dumps(pattern_results()))
    (folder / "pattern_torn.json").write_text("{")
    return written(folder, everything(), predictions=records(), diagnostics=DIAGNOSTICS)


def anchors(html: str) -> list[str]:
    return re.findall(r'<h2 id="(\w+)">', html)


class _Page(HTMLParser):
    """The tables and pictures outside a box that scrolls, and the captions of figures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.outside: list[str] = []
        self.figures = 0
        self.captions: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        is_boxed = any("scroll" in names.split() for _, names in self.open)
        if tag in ("table", "img") and not is_boxed:
            self.outside.append(tag)
        self.figures += tag == "figure"
        if tag == "figcaption":
            self.captions.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if any(tag == "figcaption" for tag, _ in self.open):
            self.captions[-1] += data


def test_all_sections_are_there_and_in_the_contents(full: dict[str, str]) -> None:
    html, text = full["report.html"], full["report.md"]
    assert anchors(html) == [*SECTIONS]
    assert re.findall(r'<a href="#(\w+)">', html) == [*SECTIONS]
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE)[2:] == [*SECTIONS.values()]


def test_a_section_without_content_is_not_there(tmp_path: Path) -> None:
    found = written(tmp_path, {})
    assert anchors(found["report.html"]) == ["hypotheses", "reproduce"]
    assert "By data set" not in found["report.md"]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("bytes", "coded_text"),
        ("sets", "sets"),
        ("continuation", "continuation"),
        ("joint", "joint"),
        ("training", "validation"),
        ("collapse", "collapse"),
        ("readers", "readers"),
    ],
)
def test_each_section_goes_with_its_content(tmp_path: Path, section: str, key: str) -> None:
    metrics = {key: everything()[key]}
    found = written(tmp_path, metrics)["report.html"]
    assert section in anchors(found)
    assert set(anchors(found)) <= {"hypotheses", "reproduce", section, "accuracy"}


def test_nothing_is_wider_than_its_box(full: dict[str, str]) -> None:
    page = _Page()
    page.feed(full["report.html"])
    assert page.outside == []


def test_every_figure_says_of_how_many_and_by_what_command(full: dict[str, str]) -> None:
    page = _Page()
    page.feed(full["report.html"])
    accuracy, learning = page.captions
    assert page.figures == 2
    assert "95% intervals" in accuracy
    assert f"40 examples · {EVALUATE}" in accuracy
    assert "4 logged steps · python -m latentwire_fast.train" in learning


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_every_section_with_numbers_has_its_source(full: dict[str, str], file: str) -> None:
    cut = r'<h2 id="' if file.endswith("html") else r"^## "
    parts = re.split(cut, full[file], flags=re.MULTILINE)[1:]
    without = ("good", "bad", "Answered", "What this", "Read this")
    with_numbers = [part for part in parts if not part.startswith(without)]
    assert len(with_numbers) == len(SECTIONS) - 2
    for part in with_numbers:
        assert "python -m latentwire_fast." in part, part[:40]


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_patterns_are_shown(full: dict[str, str], file: str) -> None:
    text = full[file]
    assert PATTERN in text
    assert "1,234 questions, 20 others to fit on (mmlu=data.tar)" in text.replace("\\", "")
    assert "joint minus llama" in text
    assert "+50.0" in text
    assert "170" in text


def test_a_report_is_written_again_from_its_files(tmp_path: Path) -> None:
    """As a pattern does it: with the pattern in it, the scores as they were."""
    folder = RunFolder(tmp_path)
    folder.eval.mkdir()
    folder.metrics.write_text(json.dumps(everything()))
    folder.predictions.write_text("".join(json.dumps(record) + "\n" for record in records()))
    folder.config.write_text(json.dumps(to_json(PRESETS["testbed"]())))
    folder.pattern("routing").write_text(json.dumps(pattern_results()))
    rewrite_report(folder)
    found = folder.report.read_text()
    assert "patterns" in anchors(found)
    assert "50.0" in found
    assert EVALUATE in found


def test_scores_at_every_width_have_intervals(tmp_path: Path) -> None:
    """Also the further scores and those of all readers: from the predictions."""
    found = written(tmp_path, everything(), predictions=records())["report.md"]
    row = next(line for line in found.splitlines() if line.startswith("| 6 (this run)"))
    assert re.search(r"50\.0 \[\d+\.\d to \d+\.\d\]", row)
    table = (tmp_path / "metrics.csv").read_text()
    assert re.search(r"^llama,latent_4_bits,f1,0\.25,0\.\d+,0\.\d+$", table, flags=re.MULTILINE)
    assert re.search(r"^llama,latent,rouge1,0\.5,0\.\d+,0\.\d+$", table, flags=re.MULTILINE)
    assert re.search(r"^joint,,oracle_f1,0\.5,0\.\d+,0\.\d+$", table, flags=re.MULTILINE)


def test_bootstrap_is_that_of_the_evaluation() -> None:
    """Nearly the same bounds as `mean_interval`; questions on one context stay together."""
    rng = np.random.default_rng(0)
    values = [float(v) for v in rng.random(200)]
    contexts = [f"c{i // 4}" for i in range(200)]
    found = Bootstrap([{"context": c} for c in contexts], seed=1).interval(values)
    expected = mean_interval(values, seed=1, clusters=contexts)
    assert found is not None
    assert found["mean"] == pytest.approx(expected.mean)
    assert found["low"] == pytest.approx(expected.low, abs=0.01)
    assert found["high"] == pytest.approx(expected.high, abs=0.01)


def test_scores_of_other_examples_get_no_intervals() -> None:
    metrics = everything()
    metrics["readers"]["llama"]["latent_bits"]["6"]["f1"] = 0.9
    rows = records()
    found = with_intervals(metrics, rows, Bootstrap(rows, seed=0))
    assert found["readers"]["llama"]["latent_bits"]["6"]["f1"] == 0.9
    assert with_intervals({}, [], Bootstrap([], seed=0)) == {}


def test_figures_are_readable_on_white_and_on_dark() -> None:
    """What is written in a picture has contrast on both pages, and no background of its own."""

    def luminance(colour: str) -> float:
        linear = [((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for ink in (figures.INK, figures.MUTED):
        on_white = 1.05 / (luminance(ink) + 0.05)
        on_dark = (luminance(ink) + 0.05) / (luminance("#0b1120") + 0.05)
        assert min(on_white, on_dark) > 3.8
    assert figures.STYLE["figure.facecolor"] == "none"


def test_names_in_figures() -> None:
    missing = "\U00013000"  # a hieroglyph
    names = ["llama", missing, "x" * 80, "x" * 80 + "y"]
    shown = shown_names(names)
    assert shown["llama"] == "llama"
    assert shown[missing] == "reader 2"
    assert len(shown["x" * 80]) == LONGEST
    assert len(set(shown.values())) == len(names)
    assert f"reader 2: {missing}" in figure_note(names)
    assert figure_note(["llama"]) == ""


@pytest.mark.filterwarnings("error")  # a letter that no font has is a warning
def test_many_readers_and_other_scripts_are_drawn(tmp_path: Path) -> None:
    metrics = everything()
    metrics["readers"] = {f"読者 {i}": reader_entry() for i in range(50)}
    diagnostics = [
        {**record, "accuracy": {f"読者 {i}": i / 50 for i in range(50)}} for record in DIAGNOSTICS
    ]
    assert accuracy_figure(metrics)
    assert learning_figure(diagnostics)
    assert "median of the 50 readers" in figure_note(list(metrics["readers"]))
    few = {name: reader_entry() for name in ("読者", "\U00013000")}
    assert len(few) <= MANY
    assert accuracy_figure({**metrics, "readers": few})


def test_commands_are_as_typed() -> None:
    found = command(
        "latentwire_fast.evaluate",
        "a b",
        examples=None,
        best=True,
        set=("x=[1, 2]", "y=2"),
        fresh_seed=0,
    )
    assert found == (
        "python -m latentwire_fast.evaluate --run 'runs/a b' --best --set 'x=[1, 2]' --set y=2 "
        "--fresh-seed 0"
    )
