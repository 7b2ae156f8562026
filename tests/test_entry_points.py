"""The commands as a user runs them: from a text to an answer, and what a mistake looks like."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentwire_fast import wire
from latentwire_fast.cli import parse_pairs, run_entry_point
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.sources import heldout_examples, in_split
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError, RunStopped, TrainingError
from latentwire_fast.files.lock import RunLock
from latentwire_fast.prompts.builder import full_text
from latentwire_fast.training.checkpoint import load_checkpoint
from latentwire_fast.wire.store import PayloadStore
from runs import (
    changed,
    contents,
    deep,
    environment_on_the_cpu,
    model_digest,
    records,
    soft,
    squad_file,
    store,
    tiny_config,
    train,
    train_on_the_cpu,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")

STEPS = 100
WIDTHS = ["16", "8", "6", "4"]
CONTEXT = "Nulnak is already 94 years old. The dog of Bakrim is named Fosvun."


def start(module: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`python -m latentwire_fast.MODULE ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [*python(module), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_on_the_cpu(),
        **options,
    )


def command(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, when it has ended."""
    process = start(module, *arguments, **options)
    output, errors = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def python(module: str) -> list[str]:
    """The beginning of a command line."""
    return [sys.executable, "-m", f"latentwire_fast.{module}"]


def apart(module: str, *arguments: object) -> tuple[int, str, str]:
    """`in_this_process`, in a process of its own."""
    process = command(module, *arguments)
    return process.returncode, process.stdout, process.stderr


def done(module: str, *arguments: object) -> str:
    """What a command that must succeed printed."""
    process = command(module, *arguments)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "Traceback" not in process.stderr
    return process.stdout


# --- from end to end ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQuAD file with passages in both splits."""
    examples = make_examples(40, seed=5, facts=2)
    assert 2 <= sum(in_split(e, "heldout") for e in examples) < 20
    return squad_file(examples, tmp_path_factory.mktemp("data") / "squad.json")


@pytest.fixture(scope="module")
def file_run(
    llama_folder: Path, qwen_folder: Path, squad: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run on the SQuAD file with two local readers, evaluated; and what the command printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "file"
    output = done(
        "train",
        *("testbed_smoke", "--run", run_dir, "--data", squad, "--seed", "3"),
        *("--reader", f"one={llama_folder}", "--reader", f"two={qwen_folder}"),
        *("--steps", "3", "--batch-size", "2", "--eval-examples", "3"),
    )
    return run_dir, output


@pytest.mark.slow
def test_training_on_a_file_with_local_readers(
    file_run: tuple[Path, str], llama_folder: Path, qwen_folder: Path, squad: Path
) -> None:
    run_dir, output = file_run
    config = json.loads((run_dir / "config.json").read_text())
    assert {n: r["source"] for n, r in config["readers"].items()} == {
        "one": str(llama_folder),
        "two": str(qwen_folder),
    }
    assert config["encoder"]["source"] == str(llama_folder), "the first reader's weights"
    assert config["data"]["source"] == str(squad)
    assert config["seed"] == 3
    metrics = json.loads((run_dir / "eval" / "metrics.json").read_text())
    assert metrics["schema_version"] == 1
    assert metrics["run"]["name"] == "file"
    assert metrics["examples"] == 3
    assert set(metrics["readers"]) == {"one", "two"}
    assert set(metrics["readers"]["one"]["latent_bits"]) == set(WIDTHS)
    assert f"report: {run_dir / 'eval' / 'report.html'}" in output
    assert "full text" in output
    for name in ("metrics.csv", "predictions.jsonl", "report.html", "report.md"):
        assert (run_dir / "eval" / name).stat().st_size > 0
    records = [
        json.loads(x) for x in (run_dir / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    heldout = {e.id for e in make_examples(40, seed=5, facts=2) if in_split(e, "heldout")}
    assert len(records) == 3
    assert {record["id"] for record in records} <= heldout
    assert "two" in (run_dir / "model" / "README.md").read_text()


@pytest.mark.slow
def test_the_same_command_again_says_what_is_there(file_run: tuple[Path, str], squad: Path) -> None:
    """In the same process: a finished run is neither trained nor evaluated again."""
    run_dir, _ = file_run
    config = json.loads((run_dir / "config.json").read_text())
    before = contents(run_dir)
    status, error = mistake(
        "train",
        *("testbed_smoke", "--run", run_dir, "--data", squad, "--seed", "3"),
        *[x for n, r in config["readers"].items() for x in ("--reader", f"{n}={r['source']}")],
        *("--steps", "3", "--batch-size", "2", "--eval-examples", "3"),
    )
    assert status == 0, error
    assert contents(run_dir) == before


@pytest.fixture(scope="module")
def run_dir(
    llama_folder: Path, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on the testbed, trained for a step in this process."""
    stages = (StageConfig("answer", steps=1),)
    config = tiny_config(llama_folder, qwen_folder, stages=stages)
    return train_on_the_cpu(config, tmp_path_factory.mktemp("runs") / "testbed").folder.path


@pytest.fixture(scope="module")
def pure_run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a latent that holds the question."""
    config = tiny_config(llama_folder, mode="pure", stages=(StageConfig("answer", steps=1),))
    return train_on_the_cpu(config, tmp_path_factory.mktemp("runs") / "pure").folder.path


@pytest.mark.slow
def test_fresh_examples_are_scored_into_a_file_of_their_own(run_dir: Path, tmp_path: Path) -> None:
    before = contents(run_dir)
    out = tmp_path / "fresh.json"
    arguments = ("--run", run_dir, "--fresh-seed", 7, "--examples", 3, "--out", out)
    assert f"metrics: {out}" in done("evaluate", *arguments)
    metrics = json.loads(out.read_text())
    assert metrics["examples"] == 3
    assert metrics["run"]["name"] == "testbed"
    assert contents(run_dir) == before
    again = tmp_path / "again.json"
    status, error = mistake("evaluate", *arguments[:-1], again)
    assert status == 0, error
    for part in ("readers", "joint", "hypotheses", "bytes"):
        ours, theirs = (strip_times(m[part]) for m in (json.loads(again.read_text()), metrics))
        assert ours == theirs, "the same seed gives the same scores"


TIMED = ("prefill_ms_p50", "end_to_end_ms_p50", "H5")


def strip_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: strip_times(v) for k, v in value.items() if k not in TIMED}
    return value


@pytest.mark.slow
def test_encode_and_generate_meet_over_a_file_of_bytes(run_dir: Path, tmp_path: Path) -> None:
    note, payload = tmp_path / "note.txt", tmp_path / "note.lwire"
    note.write_text(CONTEXT)
    # One command here and one in a process of its own: what they share is the file.
    arguments: tuple[object, ...] = ("--run", run_dir, "--context", note, "--out", payload)
    status, output, error = in_this_process("encode", *arguments)
    assert status == 0, error
    size = payload.stat().st_size
    header = wire.read_header(payload.read_bytes())
    assert f"{payload}: {size} bytes for {len(CONTEXT)} bytes of text" in output
    assert f"({wire.brotli_bytes(CONTEXT)} with brotli)" in output
    assert "encode" in output
    assert "ms" in output
    assert (header.bits, header.latents, header.d_z) == (6, 4, 8)
    arguments = ("--run", run_dir, "--payload", payload)
    arguments += ("--question", "How old is Nulnak?", "--max-new-tokens", 4)
    answers = [done("generate", *arguments, "--reader", "llama")]
    for reader in ("llama", "qwen2"):
        status, output, error = in_this_process("generate", *arguments, "--reader", reader)
        assert status == 0, error
        answers.append(output)
    assert answers[0].splitlines()[1] == answers[1].splitlines()[1], "the same in any process"
    for output in answers:
        lines = output.splitlines()
        assert lines[0].startswith("load ")
        assert lines[1].startswith("answer: ")
        assert lines[2].startswith(f"{size} bytes, payload to logits ")
        assert len(lines) == 3


def test_encode_and_generate_meet_over_a_store(run_dir: Path, tmp_path: Path) -> None:
    """Two processes of torchrun, one after the other; the second completes what the first began."""
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    texts = {f"p{i}": example.context for i, example in enumerate(make_examples(5, seed=1))}
    corpus.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in texts.items()))
    encode = ("--run", run_dir, "--data", f"passages={corpus}", "--out", folder, "--shard-size", 2)
    for rank, encoded in (("1", 2), ("0", 3), ("0", 0)):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
                patch.setenv(name, value)
            status, output, _ = in_this_process("encode", *encode)
        assert status == 0
        assert f"{encoded} of 5 passages encoded by process {int(rank) + 1} of 2" in output
    stored = PayloadStore(folder)
    ids = ("p3", "p0")
    wire.write_payloads(tmp_path / "two.lwire", stored.messages(ids))  # type: ignore[arg-type]
    ask = ("--run", run_dir, "--reader", "llama", "--question", "Who?", "--max-new-tokens", 3)
    for together in ((), ("--together",)):
        found = [
            re.findall("(?:answer: .*|[0-9]+ bytes,)", in_this_process("generate", *ask, *given)[1])
            for given in (
                ("--store", folder, "--ids", *ids, *together),
                ("--payload", tmp_path / "two.lwire", *together),
            )
        ]
        assert found[0] == found[1]
        assert len(found[0]) == (2 if together else 4)


def test_a_pure_payload_stands_for_its_question_too(
    pure_run: Path, note: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, question = tmp_path / "x.lwire", "How old is Nulnak?"
    arguments = ("--run", pure_run, "--context", note, "--out", out, "--question", question)
    status, output, error = in_this_process("encode", *arguments)
    assert status == 0, error
    size, text = out.stat().st_size, full_text(CONTEXT, question)
    assert f"{size} bytes for {len(text)} bytes of text ({wire.brotli_bytes(text)} with" in output
    arguments = ("--run", pure_run, "--reader", "llama", "--payload", out)
    status, output, error = in_this_process("generate", *arguments)
    assert status == 0, error
    assert re.search(rf"^answer: .*\n{size} bytes, payload to logits [\d.]+ ms, ", output, re.M)
    status, again, error = in_this_process("generate", *arguments, "--question", "Who?")
    assert status == 0, error
    assert again.splitlines()[1] == output.splitlines()[1]
    assert "--question is not used" in caplog.text


@pytest.mark.slow
def test_a_pipe_from_encode_to_generate(run_dir: Path, note: Path, tmp_path: Path) -> None:
    """F26, F30: `-` is standard output, and standard input; all that is said, by a module of the
    user's too, goes to standard error."""
    out = tmp_path / "x.lwire"
    status, _, error = in_this_process("encode", "--run", run_dir, "--context", note, "--out", out)
    assert status == 0, error
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "noisy.py").write_text("print('imported')\n")
    encode = [*python("encode"), "--run", run_dir, "--context", "-", "--out", "-"]
    encode += ["--import", "noisy"]
    answer = ["--run", run_dir, "--reader", "llama", "--question", "Who?", "--payload"]
    status, output, error = in_this_process("generate", *answer, out)
    assert status == 0, error
    expected = output.splitlines()[1]
    environment = environment_on_the_cpu()
    sent = subprocess.run(
        [*map(str, encode)],
        input=f"\ufeff{CONTEXT}\r\n".encode(),
        capture_output=True,
        env=environment,
        check=True,
        cwd=tmp_path / "own",
    )
    assert sent.stdout == out.read_bytes()
    assert b"imported" in sent.stderr
    assert f"-: {len(sent.stdout)} bytes for {len(CONTEXT)} bytes of text".encode() in sent.stderr
    for place in ("-", "/dev/stdin"):
        command = [*python("generate"), *answer, place]
        done = subprocess.run(
            [*map(str, command)],
            input=sent.stdout,
            capture_output=True,
            env=environment,
            check=True,
        )
        assert done.stdout.decode().splitlines()[1] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.txt", "own", "x.lwire"]


def test_bytes_are_not_printed_on_a_terminal(
    run_dir: Path, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    status, error = mistake("encode", "--run", run_dir, "--context", note, "--out", "-")
    assert (status, error) == (
        2,
        "error: --out - would write bytes to a terminal; pipe it, or name a file\n",
    )


class Piped(io.StringIO):
    """Standard input that somebody wrote these bytes to."""

    def __init__(self, content: bytes, *, terminal: bool = False) -> None:
        super().__init__()
        self.buffer = io.BytesIO(content)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "standard input holds no text"),
        (b" \n ", "standard input holds no text"),
        (b"caf\xe9", "standard input is not UTF-8 text (byte 3); convert it first"),
        (None, "--context - reads standard input, which is closed; pipe something in"),
    ],
)
def test_a_context_that_is_piped_in_is_text(
    run_dir: Path,
    tmp_path: Path,
    content: bytes | None,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", None if content is None else Piped(content))
    found = mistake("encode", "--run", run_dir, "--context", "-", "--out", tmp_path / "x.lwire")
    assert found == (2, f"error: {error}\n")


@pytest.mark.parametrize(
    ("stdin", "error"),
    [
        (Piped(b""), "standard input: is empty; a payload file holds at least one payload"),
        (Piped(b"", terminal=True), "--payload - would read bytes from a terminal; pipe them, or"),
        (None, "--payload - reads standard input, which is closed; pipe something in"),
    ],
)
def test_payloads_that_are_piped_in_are_bytes(
    run_dir: Path, stdin: Piped | None, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    arguments = ("--run", run_dir, "--reader", "llama", "--payload", "-", "--question", "Who?")
    status, found = mistake("generate", *arguments)
    assert status == 2
    assert error in found


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_is_one_line(run_dir: Path, note: Path) -> None:
    arguments = ["--run", run_dir, "--context", note, "--out", "-"]
    with subprocess.Popen(
        [*python("encode"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment_on_the_cpu(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 2
    assert error == "error: the reader of standard output ended before all was written\n"


@pytest.mark.slow
def test_devices_and_dtypes(
    run_dir: Path, llama_folder: Path, note: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Readers in another dtype are still those that the model was trained for; an encoder in
    another dtype writes payloads that the same model reads."""
    short, full = tmp_path / "short.lwire", tmp_path / "full.lwire"
    for out, dtype in ((short, "bfloat16"), (full, "float32")):
        arguments = ("--run", run_dir, "--context", note, "--out", out, "--device", "cpu")
        status, _, error = in_this_process("encode", *arguments, "--dtype", dtype, "--bits", 16)
        assert status == 0, error
    one, other = (wire.unpack(path.read_bytes()) for path in (short, full))
    assert one[1] == other[1], "bits, shape and fingerprint"
    assert 0 < (one[0] - other[0]).norm() < 0.1 * other[0].norm()
    for dtype in ("float32", "bfloat16", "float16"):
        arguments = ("--run", run_dir, "--reader", "llama", "--payload", short)
        arguments += ("--question", "Who?", "--device", "cpu", "--dtype", dtype)
        status, output, error = in_this_process("generate", *arguments)
        assert status == 0, error
        assert "answer: " in output
    out = tmp_path / "metrics.json"
    arguments = ("--run", run_dir, "--out", out, "--examples", 3, "--device", "cpu")
    status, _, error = in_this_process("evaluate", *arguments, "--dtype", "bfloat16")
    assert status == 0, error
    assert json.loads(out.read_text())["examples"] == 3
    arguments = ("testbed_smoke", "--reader", f"llama={llama_folder}", "--steps", 3, "--no-eval")
    arguments += ("--run", tmp_path / "run", "--device", "cpu", "--dtype", "bfloat16")
    status, error = mistake("train", *arguments)
    assert status == 0, error
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["readers"]["llama"]["dtype"] == "bfloat16"


SHAPES: dict[str, dict[str, Any]] = {
    "soft, pure": {"mode": "pure", "attachments": (soft(),)},
    "deep, context": {"mode": "context", "attachments": (deep(width=32),)},
    "both, context": {"mode": "context", "attachments": (soft(), deep(width=32))},
    "asked otherwise": {"mode": "context", "attachments": (soft(),)},
}
ASKED: dict[str, dict[str, Any]] = {
    "asked otherwise": {"anchor": "chat", "bos": False, "append_bos_after_prefix": True}
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_sent_and_answered_is_what_the_evaluator_scored(
    shape: str, llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    """`encode` in one process and `generate` in another: the prediction of each example."""
    stages = (StageConfig("answer", steps=1),)
    config = tiny_config(llama_folder, qwen_folder, stages=stages, **SHAPES[shape])
    asked = {name: replace(r, **ASKED.get(shape, {})) for name, r in config.readers.items()}
    asked["qwen2"] = replace(asked["qwen2"], append_bos_after_prefix=False)  # it has no BOS
    config = changed(config, data={"eval_examples": 3}, readers=asked)
    run = train(config, tmp_path / "run").folder.path
    status, _, error = in_this_process("evaluate", "--run", run)
    assert status == 0, error
    lines = (run / "eval" / "predictions.jsonl").read_text().splitlines()
    heldout = heldout_examples(config.data)
    assert len(lines) == len(heldout) == 3
    for number, (line, example) in enumerate(zip(lines, heldout, strict=True)):
        record = json.loads(line)
        assert record["id"] == example.id
        note, out = tmp_path / "context.txt", tmp_path / "context.lwire"
        note.write_text(example.context)
        question = ("--question", example.question)
        sent = ("--run", run, "--context", note, "--out", out)
        run_command = apart if number == 0 else in_this_process
        status, _, error = run_command("encode", *sent, *question[: 2 * (config.mode == "pure")])
        assert status == 0, error
        for name in ["qwen2"] if number == 0 else config.readers:
            arguments = ("--run", run, "--reader", name, "--payload", out)
            if config.mode == "context":
                arguments += question
            longest = ("--max-new-tokens", config.evaluation.max_new_tokens)
            status, output, error = run_command("generate", *arguments, *longest)
            assert status == 0, error
            answer = output.split("answer: ", 1)[1].rsplit("\n", 2)[0]
            assert answer == record["readers"][name]["latent"]["prediction"]


def test_help_names_a_flag_once() -> None:
    status, output, _ = in_this_process("train", "--help")
    assert status == 0
    assert "--no-eval " in output
    assert "--no-no-eval" not in output


# --- Ctrl-C -------------------------------------------------------------------------------------


def stop_training(process: subprocess.Popen[str], run_dir: Path, *, after: int, times: int) -> str:
    """Send SIGINT once so many steps are logged, wait for the end; what stood on stderr."""
    diagnostics = run_dir / "diagnostics.jsonl"
    while not diagnostics.exists() or diagnostics.read_text().count("\n") <= after:
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.005)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)  # two that wait together would be one
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors[-4000:]
    assert "Traceback" not in errors
    return errors.rsplit("\n", 2)[-2]


def test_ctrl_c_saves_and_the_same_command_goes_on(llama_folder: Path, tmp_path: Path) -> None:
    """Also in a background job of a script, where SIGINT is ignored from the start."""
    run_dir, plain = tmp_path / "stopped", tmp_path / "plain"
    config = store(tiny_config(llama_folder, save_every=1000), tmp_path / "config.json")
    arguments = (config, "--steps", STEPS, "--no-eval", "--run")
    status, error = mistake("train", *arguments, plain)
    assert status == 0, error

    process = start("train", *arguments, run_dir, preexec_fn=ignore_ctrl_c)
    last = stop_training(process, run_dir, after=0, times=1)
    saved = load_checkpoint(run_dir / "checkpoints").step
    assert last == (
        f"stopped by a signal after step {saved} of {STEPS}; everything is saved. "
        "Run the same command to go on"
    )
    assert len(records(run_dir)) == saved

    process = start("train", *arguments, run_dir)
    last = stop_training(process, run_dir, after=saved, times=2)
    assert last == "interrupted" or last.startswith("stopped by a signal")
    again = load_checkpoint(run_dir / "checkpoints").step
    assert again >= saved, "nothing that was saved is lost"

    status, error = mistake("train", *arguments, run_dir)
    assert status == 0, error
    assert records(run_dir) == records(plain)
    assert model_digest(run_dir) == model_digest(plain)


def ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- mistakes -----------------------------------------------------------------------------------


def mistake(module: str, *arguments: object) -> tuple[int, str]:
    """Exit status and stderr of a command, run in this process."""
    status, _, errors = in_this_process(module, *arguments)
    return status, errors


def in_this_process(module: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    main = importlib.import_module(f"latentwire_fast.{module}").main
    output, errors = io.StringIO(), io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                run_entry_point(main)
            except SystemExit as stop:
                status = int(stop.code or 0)
    return status, output.getvalue(), errors.getvalue()


@pytest.mark.parametrize("setting", ["encoder.kind=byte", "encoder.source=testbed:llama"])
def test_an_encoder_that_is_set_away_again_is_said(setting: str) -> None:
    arguments = ("testbed_smoke", "--encoder", "testbed:qwen", "--set", setting, "--print-config")
    status, error = mistake("train", *arguments)
    assert status == 2
    assert "--encoder testbed:qwen, and --set asks for" in error


@pytest.fixture
def note(tmp_path: Path) -> Path:
    path = tmp_path / "note.txt"
    path.write_text(CONTEXT)
    return path


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """What some other model wrote."""
    path = tmp_path / "other.lwire"
    wire.write_payloads(path, [wire.pack(torch.ones(4, 8), bits=6, group_size=32, fingerprint=1)])
    return path


# What a user types after `python -m latentwire_fast.MODULE`, and a part of the answer.
MISTAKES: dict[str, tuple[str, str, str]] = {
    "unknown preset": ("train", "nobody", "no preset 'nobody'"),
    "configuration missing": ("train", "{tmp}/no.json", r"no\.json"),
    "configuration is no .json": ("train", "{note}", "or give a .json"),
    "reader without a path": ("train", "testbed_smoke --reader llama", "expected NAME=SOURCE"),
    "reader twice": ("train", "testbed_smoke --reader a=x --reader a=y", "'a' is given twice"),
    "reader with a version": ("train", "testbed_smoke --reader a-1.5=x", "'a-1.5': give it one of"),
    "reader called like a method": ("train", "testbed_smoke --reader type=x", "'type' is taken"),
    "reader not there": (
        "train",
        "testbed_smoke --reader a={tmp}/nowhere --run {tmp}/run",
        "cannot load '.*nowhere'",
    ),
    "reader folder without a model": (
        "train",
        "testbed_smoke --reader a={tmp} --run {tmp}/run",
        "cannot load",
    ),
    "no such shipped reader": (
        "train",
        "testbed_smoke --reader a=testbed:nobody --run {tmp}/run",
        "no shipped reader 'testbed:nobody'",
    ),
    "no steps": ("train", "testbed_smoke --steps 0", "steps=0, expected at least 1"),
    "empty batches": ("train", "testbed_smoke --batch-size 0", "batch_size=0"),
    "data not there": (
        "train",
        "{config} --data {tmp}/no.json --run {tmp}/run",
        "no such file",
    ),
    "data is no JSON": ("train", "{config} --data {note} --run {tmp}/run", "not valid JSON"),
    "seed that generators refuse": ("train", "{config} --run {tmp}/run --seed -1", "seed=-1"),
    "data file without questions": (
        "train",
        "{config} --data {empty} --run {tmp}/run",
        "holds no questions",
    ),
    "nothing held out": (
        "train",
        "{config} --data {one} --run {tmp}/run",
        "no usable example in split 'heldout'",
    ),
    "reader with pickles only": (
        "train",
        "testbed_smoke --reader a={pickles} --run {tmp}/run",
        r"holds weights as pickles \(\.bin\).*save_pretrained",
    ),
    "link to nowhere": (
        "train",
        "{config} --run {link} --no-eval",
        "cannot write to run folder .*link",
    ),
    "run folder is a file": ("train", "{config} --run {note}", "note.txt"),
    "run of another configuration": ("train", "{config} --run {run} --seed 8", "differs in seed"),
    "not a run folder": ("evaluate", "--run {tmp}", "holds no trained model"),
    "fresh seed without a file": (
        "evaluate",
        "--run {run} --fresh-seed 3",
        "--fresh-seed needs --out",
    ),
    "no examples": (
        "evaluate",
        "--run {run} --fresh-seed 3 --examples 0 --out {tmp}/m.json",
        "error: examples=0, expected at least 1",
    ),
    "no folder for the metrics": (
        "evaluate",
        "--run {run} --fresh-seed 3 --examples 2 --out {tmp}/nowhere/m.json",
        "nowhere",
    ),
    "context not there": ("encode", "--run {run} --context {tmp}/no --out {tmp}/x", "/no: No such"),
    "context not text": (
        "encode",
        "--run {run} --context {binary} --out {tmp}/x",
        "is not UTF-8 text",
    ),
    "model not there": (
        "encode",
        "--run {tmp} --context {note} --out {tmp}/x",
        r"config\.json: no such file; is .* a saved model",
    ),
    "configuration is a folder": ("train", "{tmp}/folder.json", r"folder\.json: is a folder"),
    "question in context mode": (
        "encode",
        "--run {run} --context {note} --out {tmp}/x --question Who?",
        "reads no question",
    ),
    "context without text": ("encode", "--run {run} --context {blank} --out {tmp}/x", "no text"),
    "context too long": (
        "encode",
        "--run {run} --context {long} --out {tmp}/x",
        r"the text has [\d,]+ tokens, the encoder reads 1,024",
    ),
    "payload over a folder": (
        "encode",
        "--run {run} --context {note} --out {tmp}",
        "Is a directory.*; give the path of a file",
    ),
    "payload over the folder one is in": (
        "encode",
        "--run {run} --context {note} --out .",
        "Is a directory: '.'; give the path of a file",
    ),
    "payload over everything": ("encode", "--run {run} --context {note} --out /", "Is a directory"),
    "payload over its text": (
        "encode",
        "--run {run} --context {note} --out {tmp}/../{tmp.name}/note.txt",
        "note.txt is the context's own file; give another",
    ),
    "payload over a file of the run": (
        "encode",
        "--run {run} --context {note} --out {run}/config.json",
        r"config\.json belongs to the run; give another",
    ),
    "no width": ("encode", "--run {run} --context {note} --out {tmp}/x --bits 0", "bits"),
    "odd width": (
        "encode",
        "--run {run} --context {note} --out {tmp}/x --bits 5",
        "bits",
    ),
    "no folder for the payload": (
        "encode",
        "--run {run} --context {note} --out {tmp}/nowhere/x",
        "there is no folder .*nowhere; make it",
    ),
    "unknown reader": (
        "generate",
        "--run {run} --reader gpt --payload {payload} --question Who?",
        r"no reader 'gpt' in this run; there are \['llama', 'qwen2'\]",
    ),
    "no question": (
        "generate",
        "--run {run} --reader llama --payload {payload}",
        "give --question",
    ),
    "question of undecodable bytes": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question \udcff",
        "is not UTF-8 text",
    ),
    "impossible gain": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question Who? --prefix-gain nan",
        "prefix_gain=nan",
    ),
    "gain far out": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question Who? --prefix-gain 1e30",
        r"prefix_gain=1e\+30, expected above 0 and at most 1000",
    ),
    "device that is none": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question Who? --device fast",
        "--device 'fast' is no device; this machine has cpu",
    ),
    "device that torch does not see": (
        "encode",
        "--run {run} --context {note} --out {tmp}/x --device xla",
        "--device xla: torch sees no such device here",
    ),
    "device for weights without values": (
        "evaluate",
        "--run {run} --device meta",
        "--device meta: torch sees no such device here",
    ),
    "device with a number too high": (
        "train",
        "testbed_smoke --device cpu:3 --run {tmp}/run",
        "--device cpu:3: there is one CPU device; write cpu",
    ),
    "payload of another model": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question Who?",
        "was written by model 0x0001",
    ),
    "payload is text": (
        "generate",
        "--run {run} --reader llama --payload {note} --question Who?",
        "note.txt: payload 0 at byte 0",
    ),
    "payload not there": (
        "generate",
        "--run {run} --reader llama --payload {tmp}/no --question Who?",
        "No such file",
    ),
    "impossible decoding": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question Who? --max-new-tokens 0",
        "max_new_tokens=0",
    ),
    "end banned for less than no time": (
        "generate",
        "--run {run} --reader llama --payload {payload} --question Who? --eos-ban-steps -3",
        "eos_ban_steps=-3, expected at least 0",
    ),
    "nothing to encode": ("encode", "--run {run} --out {tmp}/x", "give --context FILE or --data"),
    "two things to encode": (
        "encode",
        "--run {run} --out {tmp}/x --context {note} --data testbed",
        "--context FILE and --data SOURCE: give one of them",
    ),
    "corpus without end": (
        "encode",
        "--run {run} --out {tmp}/x --data testbed",
        "testbed has no end; say how many passages you want",
    ),
    "store in the place of files": (
        "encode",
        "--run {run} --out {tmp} --data testbed --passages 2",
        "holds other files and no store; give a new or empty folder",
    ),
    "store over the run": (
        "encode",
        "--run {run} --out {run}/model --data testbed --passages 2",
        "model belongs to the run; give another",
    ),
    "corpus with a question": (
        "encode",
        "--run {run} --out {tmp}/x --data testbed --passages 2 --question Who?",
        "--data SOURCE and --question TEXT: give one of them",
    ),
    "no workers": (
        "encode",
        "--run {run} --out {tmp}/x --data testbed --passages 2 --ray 0",
        "0 workers, expected at least 1",
    ),
    "store without ids": (
        "generate",
        "--run {run} --reader llama --store {tmp} --question Who?",
        "give --payload FILE or --ids ID",
    ),
    "ids without a store": (
        "generate",
        "--run {run} --reader llama --payload {payload} --ids a --question Who?",
        "--payload FILE and --ids ID ...: give one of them",
    ),
    "no store": (
        "generate",
        "--run {run} --reader llama --store {tmp} --ids a --question Who?",
        "store.json: no such file; give the folder of a payload store",
    ),
    "data to score is no JSON": (
        "evaluate",
        "score --data {note} --predictions {tmp}/no.json",
        "note.txt: not valid JSON",
    ),
}


@pytest.mark.parametrize(("module", "arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    run_dir: Path,
    note: Path,
    payload: Path,
    tmp_path: Path,
    module: str,
    arguments: str,
    message: str,
) -> None:
    """What is wrong and what to do, on stderr; files are as they were."""
    files = {
        "binary": b"caf\xe9",
        "blank": b" \n",
        "long": b"word " * 2000,
        "empty": b'{"data": []}',
        "pickles/pytorch_model.bin": b"",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    squad_file(make_examples(1, seed=5, facts=2), tmp_path / "one")
    places = {name: tmp_path / name for name in (*files, "pickles", "link", "one")}
    places |= {"run": run_dir, "config": run_dir / "config.json"}
    places |= {"note": note, "payload": payload, "tmp": tmp_path}
    before = contents(run_dir), contents(tmp_path)
    status, error = mistake(module, *arguments.format(**places).split())
    lines = [line for line in error.splitlines() if line.strip()]
    assert status == 2, error
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert (contents(run_dir), contents(tmp_path)) == before


def test_a_run_folder_in_use_is_refused(run_dir: Path) -> None:
    before = contents(run_dir)
    with RunLock(run_dir):
        status, error = mistake("train", run_dir / "config.json", "--run", run_dir)
    assert status == 2
    assert f"is in use by process {os.getpid()}" in error
    assert contents(run_dir) == before


@pytest.mark.parametrize("option", ["--reader=a={}", "--encoder={}"], ids=["reader", "encoder"])
def test_a_model_without_all_of_its_weights_is_refused(
    llama_folder: Path, tmp_path: Path, option: str
) -> None:
    broken = shutil.copytree(llama_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = ("testbed_smoke", "--reader", f"b={llama_folder}", option.format(broken))
    status, error = mistake("train", *arguments, "--no-eval", "--run", tmp_path / "run")
    assert status == 2
    assert re.fullmatch(
        r"error: (preset '\w+': )?'.*broken' does not .*norm\.weight is missing; save .*\n", error
    )


def test_a_full_disk_is_one_line(
    run_dir: Path, note: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "x.lwire"
    status, error = mistake("encode", "--run", run_dir, "--context", note, "--out", out)
    assert status == 2
    assert error.splitlines() == [
        "error: [Errno 28] No space left on device; make room on that disk and run the same "
        "command again"
    ]
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.txt"]


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    """No traceback, nothing on stdout; and a wrong option is the parser's own message, also 2."""
    process = command("encode", "--run", tmp_path, "--context", tmp_path / "no", "--out", "x")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == f"error: {tmp_path / 'no'}: No such file or directory\n"
    process = command("encode", "--run", tmp_path, "--kontext", "x")
    assert process.returncode == 2
    assert "Traceback" not in process.stderr


# --- the parts ----------------------------------------------------------------------------------


def test_messages_of_several_lines_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise TrainingError("first\n  second\n")

    with pytest.raises(SystemExit, match="2"):
        run_entry_point(fail)
    assert capsys.readouterr().err == "error: first second\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_no_error(capsys: pytest.CaptureFixture[str], number: int) -> None:
    def stop() -> None:
        raise RunStopped("stopped; run the same command", status=128 + number)

    with pytest.raises(SystemExit, match=str(128 + number)):
        run_entry_point(stop)
    assert capsys.readouterr().err == "stopped; run the same command\n"


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_entry_point(interrupt)
    assert capsys.readouterr().err == "interrupted\n"


def test_unforeseen_errors_keep_their_traceback() -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_entry_point(bug)


def test_pairs_keep_their_order_and_their_equal_signs() -> None:
    pairs = parse_pairs(["b=x", "a=path=with=signs"], option="--reader")
    assert list(pairs.items()) == [("b", "x"), ("a", "path=with=signs")]
    assert parse_pairs([], option="--reader") == {}


@pytest.mark.parametrize("pair", ["", "x", "=x", "x="])
def test_bad_pairs_are_named(pair: str) -> None:
    with pytest.raises(ConfigError, match="--reader"):
        parse_pairs([pair], option="--reader")
