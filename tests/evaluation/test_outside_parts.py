"""Parts from outside the package: a method, a hypothesis and a data set, found in every result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.schema import (
    DataConfig,
    EvalConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.evaluation.hypotheses.base import (
    Evidence,
    Hypothesis,
    HypothesisConfig,
    hypotheses,
)
from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.methods.base import (
    ByBits,
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    evaluation_methods,
    text_input,
)
from latentwire_fast.evaluation.metrics import Interval
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.prompts.builder import full_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import DATA_SETS, HYPOTHESES, METHODS, Registry
from readers import tiny_interlingua

pytestmark = pytest.mark.usefixtures("on_the_cpu")


class LastBytes(EvaluationMethod):
    """The text's end, as many bytes as the payload has."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Last bytes", "the end of the context", "budget"
    is_timed = in_model_card = True
    by_bits = ByBits((("f1", "its F1 on the end of the text"),), legend="the end of the text")

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The context's last bytes."""
        cut = []
        for i in rows:
            example, size = case.examples[i], len(case.payloads[bits][i])
            end = example.context.encode()[-size:].decode(errors="ignore")
            cut.append(case.reader.prompts.text_ids(full_text(end, example.question)))
        return text_input(case, rows, cut)


class EndIsBetter(Hypothesis):
    """The end of a text against its beginning."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: F1 difference."""

        bar: float = 0.0

    quantity, unit, side = "F1 of the end minus F1 of the beginning", "points", "least"
    needs = "scores of both ends"
    reads = ("last_bytes", "byte_budget")

    @property
    def claim(self) -> str:
        """The claim in words."""
        return "The end of a text is worth as much as its beginning"

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The worst reader's difference."""
        worst = min(
            mean(reader["last_bytes"].f1) - mean(reader["byte_budget"].f1)
            for reader in evidence.methods.values()
        )
        return self.verdict(Interval(worst, worst, worst))


class Riddles(DataSet):
    """Riddles that are made here."""

    @dataclass(frozen=True)
    class Config(DataSetConfig):
        """`animal`: who has the legs."""

        animal: str = "cow"

    config: Config
    is_built_in = True

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """A hundred of them."""
        animal = self.config.animal
        return Loaded(
            (
                Example(f"riddle-{i}", f"A {animal} has {i} legs.", f"How many, {i}?", (str(i),))
                for i in range(100)
            ),
            is_of_split=False,
        )


OUTSIDE = (
    (METHODS, "last_bytes", LastBytes),
    (HYPOTHESES, "H_end", EndIsBetter),
    (DATA_SETS, "riddles", Riddles),
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outside parts, for one test."""
    for registry, name, part in OUTSIDE:
        monkeypatch.setattr(registry, "_added", {})
        registry.register(name, part)


@pytest.mark.usefixtures("registered")
def test_outside_parts_are_in_every_result(
    readers: dict[str, Reader], llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    folders = {"llama": llama_folder, "qwen": qwen_folder}
    model = tiny_interlingua(readers, "context")
    config = RunConfig(
        readers={name: ReaderConfig(str(folder)) for name, folder in folders.items()},
        encoder=model.encoder_config,
        bottleneck=model.bottleneck_config,
        attachments=model.attachment_configs,
        data=DataConfig(source="riddles", eval_examples=4),
        stages=(StageConfig("answer", steps=1),),
        evaluation=EvalConfig(batch_size=3, max_new_tokens=2, timing_examples=1, resamples=20),
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))

    metrics = evaluate_run(tmp_path, progress=False)
    assert metrics["examples"] == 4
    assert list(metrics["hypotheses"]) == [*(f"H{i}" for i in range(1, 9)), "H_end"]
    assert metrics["hypotheses"]["H_end"]["verdict"] in ("pass", "fail")
    for methods in metrics["readers"].values():
        assert methods["last_bytes"]["prefill_ms_p50"] > 0
        assert list(methods["last_bytes_bits"]) == ["16", "8", "6", "4"]

    lines = "\n".join(summary_lines(metrics))
    assert "\nlast bytes  " in lines
    assert "\nlast bytes 6 bits " in lines
    assert "H_end " in lines

    report = (tmp_path / "eval" / "report.md").read_text()
    assert "| Last bytes |" in report
    assert "its F1 on the end of the text" in report
    assert "| H_end | The end of a text is worth as much as its beginning |" in report
    assert "riddle-" in report
    assert "llama,last_bytes_4_bits,f1," in (tmp_path / "eval" / "metrics.csv").read_text()
    assert "| last bytes |" in (tmp_path / "model" / "README.md").read_text()

    records = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["context"].split()[1] for line in records} == {"cow"}


@pytest.mark.parametrize("registry", [METHODS, HYPOTHESES, DATA_SETS], ids=lambda r: r.kind)
def test_every_part_has_settings_that_name_it(registry: Registry) -> None:
    for name in registry.names():
        config = registry.config(name)
        assert config.kind == name
        assert to_json(config)["kind"] == name
        assert isinstance(registry[name](config), registry[name])
        assert registry[name].Config.__qualname__ == f"{registry[name].__name__}.Config"


def test_parts_say_what_they_are_in_words() -> None:
    for method in evaluation_methods().values():
        assert method.label
        assert method.note
        assert method.note[-1] != "."
    for hypothesis in hypotheses().values():
        assert hypothesis.claim
        assert hypothesis.quantity
        assert hypothesis.needs
