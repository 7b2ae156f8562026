"""The parts of docs/extending.md, written to files outside the package: each kind is registered,
trained for two steps, saved, loaded, and found in the results."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import latentwire_fast as lw
from latentwire_fast import registry
from latentwire_fast.config.schema import DataConfig, OptimConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.registry import (
    ATTACHMENTS,
    BOTTLENECKS,
    ENCODERS,
    HYPOTHESES,
    METHODS,
    OBJECTIVES,
    POOLERS,
    SCHEDULES,
    Registry,
)
from latentwire_fast.serving import Receiver
from latentwire_fast.training.builders import build_model
from runs import environment_on_the_cpu, records, soft, tiny_config, train, train_on_the_cpu
from test_entry_points import in_this_process

pytestmark = pytest.mark.usefixtures("on_the_cpu", "outside")

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
TABLES = {value.kind: value for value in vars(registry).values() if isinstance(value, Registry)}

# Per kind: the module of the page, and the name that it registers.
PARTS = {
    "encoder": ("letter_encoder", "letters"),
    "pooler": ("last_states", "last_states"),
    "bottleneck": ("half_precision", "half"),
    "adapter": ("doubled", "doubled"),
    "reader attachment": ("one_token", "one_token"),
    "objective": ("prefix_size", "size"),
    "schedule": ("halving", "halving"),
    "data set": ("riddles", "riddles"),
    "evaluation method": ("last_bytes", "last_bytes"),
    "hypothesis": ("above_closed_book", "H_closed_book"),
    "pattern": ("first_to_agree", "first_to_agree"),
}
OF_THE_MODEL = ("encoder", "pooler", "bottleneck", "adapter", "reader attachment")
TEXT = "Nulnak is already 94 years old."


def modules() -> dict[str, str]:
    """The text of every Python block of the page, by the name in its first line."""
    return dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE.read_text(), re.M | re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the package with a file for each part of the page."""
    folder = tmp_path_factory.mktemp("outside")
    for name, text in modules().items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def outside(folder: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules of the page, imported: every part is registered, for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for table in TABLES.values():
            patch.setattr(table, "_added", {})
        yield {name: importlib.import_module(name) for name in modules()}
    for name in modules():
        sys.modules.pop(name, None)


@pytest.fixture
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported the modules."""
    for table in TABLES.values():
        monkeypatch.setattr(table, "_added", {})
    for name in modules():
        monkeypatch.delitem(sys.modules, name, raising=False)


def changes_of(kind: str) -> dict[str, Any]:
    """The change of a run's configuration that puts a part of the model in."""
    return {
        "encoder": {"encoder": ENCODERS.config("letters", latents=4, d_z=8)},
        "pooler": {"encoder": {"pooler": POOLERS.config("last_states")}},
        "bottleneck": {"bottleneck": BOTTLENECKS.config("half")},
        "adapter": {"attachments": (soft("doubled"),)},
        "reader attachment": {"attachments": (ATTACHMENTS.config("one_token"),)},
    }[kind]


def config_of(kind: str, *folders: Path) -> RunConfig:
    """A run of two steps with a part of the model; the second one trains on quantised latents."""
    stages = (StageConfig("answer", steps=1), StageConfig("quantized", steps=1, quantize=6))
    return tiny_config(*folders, **changes_of(kind), stages=stages)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_has_a_part_of_every_kind() -> None:
    assert set(PARTS) == set(TABLES)
    assert [module for module, _ in PARTS.values()] == list(modules())
    page = PAGE.read_text()
    for kind, table in TABLES.items():
        name = next(k for k, value in vars(registry).items() if value is table)
        place = table.folder.removeprefix("latentwire_fast.").replace(".", "/")
        row = rf"^\| \[{kind}\]\(#{kind.replace(' ', '-')}\) \| `{place}/` \| `{name}` \| `\w+` \|"
        assert re.search(row, page, re.MULTILINE), kind
        assert f"\n## {kind.capitalize()}\n" in page
        assert table.names()[-1] == PARTS[kind][1]


def test_the_table_names_what_a_class_must_define(outside: dict[str, ModuleType]) -> None:
    """Everything in the last column is in the class of the page."""
    page = PAGE.read_text()
    for kind, (_, name) in PARTS.items():
        (row,) = re.findall(rf"^\| \[{kind}\].*$", page, re.MULTILINE)
        base, needed = (re.findall(r"`(\w+)`", cell) for cell in row.split("|")[4:6])
        part = TABLES[kind][name]
        assert needed
        assert set(needed) <= set(vars(part)), kind
        assert base == [part.Config.__mro__[1].__name__]


# --- parts of the model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    llama_folder: Path,
    qwen_folder: Path,
    outside: dict[str, ModuleType],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A run of two steps with each part of the model, by kind."""
    runs = tmp_path_factory.mktemp("runs")
    configs = {kind: config_of(kind, llama_folder, qwen_folder) for kind in OF_THE_MODEL}
    return {
        kind: train_on_the_cpu(config, runs / kind).folder.path for kind, config in configs.items()
    }


@pytest.fixture(scope="module")
def loaded(trained: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """What a fresh process finds in those runs, having imported the modules of the page."""
    code = f"""
import importlib, json, sys
from pathlib import Path
import latentwire_fast as lw
found = {{}}
for kind, run in {[(kind, str(run)) for kind, run in trained.items()]}:
    importlib.import_module({ {kind: PARTS[kind][0] for kind in OF_THE_MODEL} }[kind])
    model = lw.Interlingua.from_pretrained(Path(run) / "model")
    payload = model.encode_payloads([{TEXT!r}])[0]
    prefixes = model.reader_inputs("llama", model.decode_payloads([payload]))["prefixes"]
    parts = sorted({{type(module).__name__ for module in model.modules()}})
    found[kind] = {{"payload": payload.hex(), "shape": [*prefixes.shape], "parts": parts}}
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment_on_the_cpu(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_THE_MODEL)
def test_a_part_is_trained_saved_and_loaded_in_another_process(
    kind: str,
    trained: dict[str, Path],
    loaded: dict[str, dict[str, Any]],
    llama_folder: Path,
    qwen_folder: Path,
) -> None:
    config = config_of(kind, llama_folder, qwen_folder)
    assert run_config_from_json(json.loads(json.dumps(to_json(config)))) == config
    model = Interlingua.from_pretrained(trained[kind] / "model")
    payload = model.encode_payloads([TEXT])[0]
    positions = 1 if kind == "reader attachment" else 4
    assert model.positions == positions
    assert loaded[kind]["payload"] == payload.hex()
    assert loaded[kind]["shape"] == [1, positions, model.cards["llama"].d_model]
    assert TABLES[kind][PARTS[kind][1]].__name__ in loaded[kind]["parts"]
    # And a receiver reads its payloads.
    reader = load_readers(config.readers)["llama"]
    prompt = reader.prompts.build([Turn("Who?")], context=None, latent=model.mode)
    first = Receiver.of(model, reader).prefill([prompt], payloads=[payload])
    assert first.positions == len(prompt.ids) + positions


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_THE_MODEL)
@pytest.mark.usefixtures("nothing_registered")
def test_a_model_with_a_part_that_is_not_registered_says_so(
    kind: str, trained: dict[str, Path]
) -> None:
    message = rf"no {kind} '{PARTS[kind][1]}'; there are .*register the part"
    with pytest.raises(CheckpointError, match=message):
        Interlingua.from_pretrained(trained[kind] / "model")


def test_a_configuration_with_a_part_that_is_not_registered_says_so(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(llama_folder, **changes_of("bottleneck"))
    monkeypatch.setattr(BOTTLENECKS, "_added", {})
    for use in (to_json, lambda run: build_model(run, load_readers(run.readers))):
        with pytest.raises(ConfigError, match="is the Config of no registered bottleneck; regist"):
            use(config)


def test_a_part_checks_itself_against_the_run(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="encoder 'letters' reads no questions: use mode='cont"):
        tiny_config(llama_folder, **changes_of("encoder"), mode="pure")


# --- what a run learns ----------------------------------------------------------------------------


@pytest.fixture
def sized(llama_folder: Path) -> RunConfig:
    """A run that trains on the objective of the page, named in JSON."""
    data = to_json(tiny_config(llama_folder, attachments=(soft(calibration="none"),)))
    objectives = [{"kind": "size", "wanted": 2.0}, {"kind": "answer", "weight": 0.0}]
    data["stages"] = [{"name": "size", "steps": 2, "objectives": objectives}]
    return run_config_from_json(data)


def test_an_objective_trains_and_is_reported(sized: RunConfig, tmp_path: Path) -> None:
    assert json.loads(json.dumps(to_json(sized)))["stages"][0]["objectives"][0] == {
        "kind": "size",
        "weight": 1.0,
        "wanted": 2.0,
    }
    trainer = train(sized, tmp_path)
    first, second = records(tmp_path)
    assert set(first["losses"]) == {"size/llama", "answer/llama"}
    assert first["loss"] == first["losses"]["size/llama"] > second["loss"]
    assert first["size"]["llama"] == pytest.approx(2.0 - first["loss"], abs=1e-5)
    assert set(first["accuracy"]) == {"llama"}
    counts = {("size", "llama"): 7, ("answer", "llama"): 5}
    tokens = trainer.session.objectives.tokens(sized.stages[0], counts)
    assert tokens == 5, "texts are no tokens"


def test_an_objective_checks_itself_against_the_run(sized: RunConfig) -> None:
    with pytest.raises(ConfigError, match="objective 'size' needs soft tokens"):
        replace(sized, attachments=(ATTACHMENTS.config("deep"),))


def test_settings_are_nobodys_before_their_part_is_registered(
    outside: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OBJECTIVES, "_added", {})
    message = r"PrefixSize\.Config is the Config of no registered objective"
    with pytest.raises(ConfigError, match=message):
        outside["prefix_size"].PrefixSize.Config()


def test_a_schedule_gives_the_learning_rates(llama_folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(
        batch_size=2, muon_lr=None, lr_schedule=SCHEDULES.config("halving", every=1)
    )
    config = tiny_config(llama_folder, optim=optim, stages=(StageConfig("answer", steps=2),))
    assert run_config_from_json(to_json(config)) == config
    train(config, tmp_path)
    first, second = records(tmp_path)
    assert second["lr"] == pytest.approx(first["lr"] / 2)
    with pytest.raises(ConfigError, match="every=0, expected at least 1"):
        SCHEDULES.config("halving", every=0)


# --- data and evaluation --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(
    llama_folder: Path,
    qwen_folder: Path,
    outside: dict[str, ModuleType],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """A run of two steps on the data set of the page, evaluated; and its metrics."""
    config = tiny_config(
        llama_folder,
        qwen_folder,
        data=DataConfig(source="riddles", eval_examples=4),
        stages=(StageConfig("answer", steps=2),),
    )
    run = tmp_path_factory.mktemp("evaluated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        metrics = lw.train(config, run, progress=False)
    assert metrics is not None
    assert metrics == json.loads((run / "eval" / "metrics.json").read_text())
    return run, metrics


@pytest.mark.slow
def test_a_data_set_is_trained_and_evaluated_on(evaluated: tuple[Path, dict[str, Any]]) -> None:
    run, metrics = evaluated
    assert metrics["examples"] == 4
    predictions = [
        json.loads(line) for line in (run / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    assert all(re.fullmatch(r"The cow has \d+ legs\.", p["context"]) for p in predictions)
    assert all(record["accuracy"] for record in records(run))


@pytest.mark.slow
def test_a_method_is_in_every_result(evaluated: tuple[Path, dict[str, Any]]) -> None:
    run, metrics = evaluated
    assert METHODS.names()[-1] == "last_bytes"
    for methods in metrics["readers"].values():
        assert 0 <= methods["last_bytes"]["f1"]["mean"] <= 1
    assert re.search(r"^last bytes +\d", "\n".join(summary_lines(metrics)), re.MULTILINE)
    assert "| Last bytes |" in (run / "eval" / "report.md").read_text()
    assert "Last bytes" in (run / "eval" / "report.html").read_text()
    assert "llama,last_bytes,f1," in (run / "eval" / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_hypothesis_is_in_every_result(evaluated: tuple[Path, dict[str, Any]]) -> None:
    run, metrics = evaluated
    assert list(metrics["hypotheses"]) == HYPOTHESES.names()
    found = metrics["hypotheses"]["H_closed_book"]
    assert (found["bar"], found["verdict"]) == (0.1, "pass" if found["value"] >= 0.1 else "fail")
    assert f"H_closed_book {found['verdict']}" in summary_lines(metrics)[-1]
    claim = "| H_closed_book | The latent is worth at least 10 points of F1 |"
    assert claim in (run / "eval" / "report.md").read_text()


@pytest.mark.slow
def test_a_pattern_is_run_and_written(evaluated: tuple[Path, dict[str, Any]]) -> None:
    run, _ = evaluated
    arguments = ("--run", run, "--name", "first_to_agree", "--examples", 2)
    status, output, error = in_this_process("evaluate", "pattern", *arguments)
    assert status == 0, error
    file = run / "eval" / "pattern_first_to_agree.json"
    written = json.loads(file.read_text())
    assert [row["given"] for row in written["rows"]] == ["text", "payload"]
    assert all(row["gflops"] > 0 for row in written["rows"])
    assert output.startswith("Answers that all agree on: 2 questions (the run's held-out examples)")
    assert output.rstrip().endswith(f"results: {file}")
    own = (*arguments[:-2], "--out", file)
    status, _, error = in_this_process("evaluate", "pattern", *own)
    assert status == 2
    assert f"error: {file} belongs to the run; choose another name, or leave --out" in error


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_registered")
def test_commands_import_parts(llama_folder: Path, folder: Path, tmp_path: Path) -> None:
    """From training to an answer; encoding in a process of its own."""
    data = to_json(tiny_config(llama_folder, stages=(StageConfig("answer", steps=2),)))
    data["encoder"] = {"kind": "letters", "latents": 4, "d_z": 8}
    data["attachments"] = [{"kind": "soft", "adapter": {"kind": "doubled"}}]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    run, note, payload = tmp_path / "run", tmp_path / "note.txt", tmp_path / "note.lwire"
    note.write_text(TEXT)

    status, _, error = in_this_process("train", file, "--run", run, "--no-eval")
    assert status == 2
    assert "no encoder 'letters'; there are lm, byte" in error
    imports = ("--import", "letter_encoder", "--import", "doubled")
    status, _, error = in_this_process("train", file, "--run", run, "--no-eval", *imports)
    assert status == 0, error
    encode = ("--run", run, "--context", note, "--out", payload, *imports)
    command = [sys.executable, "-m", "latentwire_fast.encode", *map(str, encode)]
    environment = environment_on_the_cpu()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    answer = ("--run", run, "--reader", "llama", "--payload", payload, "--question", "Who?")
    status, output, error = in_this_process("generate", *answer, *imports)
    assert status == 0, error
    assert "\nanswer: " in output
    out = tmp_path / "metrics.json"
    score = ("--run", run, "--examples", 2, "--out", out)
    status, _, error = in_this_process("evaluate", *score, *imports, "--import", "last_bytes")
    assert status == 0, error
    assert "last_bytes" in json.loads(out.read_text())["readers"]["llama"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "--import nobody: No module named 'nobody'; give the name of a module without"),
        ("doubled.py", "--import doubled.py: No module named 'doubled.py'; .*; give the name of"),
        ("./doubled", "--import './doubled' is no module's name; give the name of a module"),
        ("", "--import '' is no module's name"),
    ],
)
@pytest.mark.parametrize("command", ["train testbed_smoke", "evaluate", "encode", "generate"])
def test_a_module_that_is_not_there(command: str, name: str, message: str, tmp_path: Path) -> None:
    given = {
        "evaluate": ("--run", tmp_path),
        "encode": ("--run", tmp_path, "--context", tmp_path / "x", "--out", tmp_path / "y"),
        "generate": ("--run", tmp_path, "--reader", "x", "--payload", tmp_path / "y"),
    }
    module, *words = command.split()
    arguments = (*words, *given.get(module, ()), "--import", name)
    status, _, error = in_this_process(module, *arguments)
    assert status == 2
    assert re.match(rf"error: {message}", error), error
    assert not any(tmp_path.iterdir())


def test_what_a_module_misses_keeps_its_traceback(folder: Path) -> None:
    (folder / "incomplete.py").write_text("import nobody_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="nobody_at_all"):
        in_this_process("train", "testbed_smoke", "--import", "incomplete")
