"""The model class in lm-evaluation-harness itself. Skipped without it (`make test-harness`)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.real.lm_eval_modes import results_of, write_tasks
from latentwire_fast import wire
from latentwire_fast.config.schema import Mode
from latentwire_fast.config.serialization import read_run_config, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.harness.requests import RequestParts, split_request
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.loading import load_tokenizer
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from readers import tiny_interlingua
from runs import tiny_config

Instance = pytest.importorskip("lm_eval.api.instance").Instance
LatentWireLM = importlib.import_module("latentwire_fast.evaluation.harness.model").LatentWireLM

# The harness's own warnings, and those of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")
REPOSITORY = Path(__file__).parents[2]
COUNT = 6


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


def a_run(folder: Path, folders: Sequence[Path], mode: Mode) -> Path:
    """A run folder with an untrained model for these readers."""
    config = tiny_config(*folders, mode=mode)
    readers = {name: Reader.from_config(name, reader) for name, reader in config.readers.items()}
    run = RunFolder(folder)
    tiny_interlingua(readers, mode).save_pretrained(run.model)
    run.config.write_text(json.dumps(to_json(config)))
    return folder


@pytest.fixture(scope="module")
def context_run(
    llama_folder: Path, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return a_run(
        tmp_path_factory.mktemp("runs") / "context", (llama_folder, qwen_folder), "context"
    )


@pytest.fixture(scope="module")
def pure_run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "pure", (llama_folder,), "pure")


@pytest.fixture(scope="module")
def tasks(examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, examples[:COUNT], chat=True)
    return folder


def model_of(run: Path, **options: Any) -> Any:
    return LatentWireLM(str(run), **{"reader": "llama", "device": "cpu", **options})


def request(
    example: Example, kind: str, argument: Any, *, field: str = "context", text: str | None = None
) -> Any:
    doc = {field: example.context, "question": example.question}
    if text is None:
        text = f"Context: {example.context}\nQuestion: {example.question}\nAnswer:"
    return Instance(kind, doc, (text, argument), 0, ("a_task", 0, 1))


def parts_of(lm: Any, example: Example) -> RequestParts:
    one = request(example, "loglikelihood", "")
    return split_request(one.args[0], one.doc, field=lm.context_field)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_text_mode_is_hf_to_the_last_bit(
    architecture: str, batch_size: int, context_run: Path, tasks: Path
) -> None:
    source = read_run_config(context_run).readers[architecture].source
    options = {"batch_size": batch_size, "apply_chat_template": True}
    plain = {"pretrained": source, "tokenizer": load_tokenizer(source), "dtype": "float32"}
    ours = {"pretrained": str(context_run), "reader": architecture, "mode": "text"}
    wanted = results_of(tasks, "hf", plain, **options)
    found = results_of(tasks, "latentwire", ours, **options)
    assert found["answers"] == wanted["answers"]
    assert found["scores"] == wanted["scores"]
    assert len(found["answers"]["mmlu_like"][0]) == 4
    assert found["info"]["latentwire_mode"] == "text"


def test_payload_mode_runs_the_same_tasks(
    context_run: Path, tasks: Path, examples: list[Example]
) -> None:
    options = {"batch_size": 4, "apply_chat_template": True, "num_fewshot": 0}
    ours = {"pretrained": str(context_run), "reader": "qwen2", "mode": "payload", "bits": 4}
    found = results_of(tasks, "latentwire", ours, **options)
    assert {*found["scores"]} == {
        *("squad_like/em", "squad_like/f1", "mmlu_like/acc", "mmlu_like/acc_norm")
    }
    model = Interlingua.from_pretrained(context_run / "model")
    texts = [example.context for example in examples[:COUNT]]
    sizes = [wire.payload_bytes(p) for p in model.encode_payloads(texts, bits=4)]
    assert found["info"]["latentwire_payload_bytes_mean"] == sum(sizes) / COUNT
    assert found["info"]["latentwire_text_utf8_bytes_mean"] == sum(map(len, texts)) / COUNT
    assert found["info"]["latentwire_bits"] == 4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_the_receiver(
    context_run: Path, examples: list[Example], batch_size: int
) -> None:
    lm = model_of(context_run, batch_size=batch_size)
    requests = [
        request(example, "loglikelihood", f" {example.answers[0]}") for example in examples[:COUNT]
    ]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    model, reader = Interlingua.from_pretrained(context_run / "model"), lm.reader
    receiver = Receiver.of(model, reader)
    for example, (score, greedy) in zip(examples[:COUNT], found, strict=True):
        prompt = lm.prompts.prompt(parts_of(lm, example), f" {example.answers[0]}")
        scores = receiver.score([prompt], payloads=model.encode_payloads([example.context]))
        assert score == pytest.approx(float(scores.gold_N.sum()), rel=1e-5)
        assert greedy == bool((scores.ranked_NK(1)[:, 0] == scores.labels_N).all())


def test_a_greedy_answer_is_found_to_be_greedy(context_run: Path, examples: list[Example]) -> None:
    lm = model_of(context_run, batch_size=4)
    settings = {"until": [], "max_gen_toks": 3}
    written = lm.generate_until(
        [request(e, "generate_until", settings) for e in examples[:COUNT]], disable_tqdm=True
    )
    whole = [(example, text) for example, text in zip(examples, written, strict=False) if text]
    found = lm.loglikelihood(
        [request(e, "loglikelihood", text) for e, text in whole], disable_tqdm=True
    )
    # Not all: a text may be tokenised in another way than it was written.
    assert any(greedy for _, greedy in found)


def test_answers_end_at_the_first_stop_text(
    context_run: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model_of(context_run, batch_size=3)
    shared = {"max_gen_toks": 40, "do_sample": False}

    def written(**settings: Any) -> list[str]:
        requests = [request(e, "generate_until", {**shared, **settings}) for e in examples[:COUNT]]
        return lm.generate_until(requests, disable_tqdm=True)

    long = written(until=[])
    assert len({*long}) > 1
    stops = [text[4:6] for text in long if len(text) > 6][:2]
    assert stops
    cut = written(until=stops)
    for text, short in zip(long, cut, strict=True):
        ends = [text.find(stop) for stop in stops if stop in text]
        assert short == (text[: min(ends)] if ends else text)
    assert written(until=stops[0]) == [text.split(stops[0])[0] for text in long]
    # Decoded in one go, without looking in between, it is the same.
    monkeypatch.setattr("latentwire_fast.evaluation.harness.model.FIRST_TOKENS", 40)
    assert written(until=stops) == cut
    one_token = written(until=[], max_gen_toks=1)
    assert all(
        text.startswith(one) and one != text for text, one in zip(long, one_token, strict=True)
    )


def test_answers_are_those_of_the_receiver(context_run: Path, examples: list[Example]) -> None:
    lm = model_of(context_run, batch_size=3)
    settings = {"until": ["</s>"], "max_gen_toks": 5}
    found = lm.generate_until(
        [request(e, "generate_until", settings) for e in examples[:COUNT]], disable_tqdm=True
    )
    model = Interlingua.from_pretrained(context_run / "model")
    prompts = [lm.prompts.prompt(parts_of(lm, example)) for example in examples[:COUNT]]
    payloads = model.encode_payloads([example.context for example in examples[:COUNT]])
    rows = Receiver.of(model, lm.reader).generate(
        prompts, payloads=payloads, options=DecodeOptions(max_new_tokens=5)
    )
    assert found == [lm.tok_decode(ids) for ids in rows]


def test_pure_mode_sends_everything(pure_run: Path, examples: list[Example]) -> None:
    lm = model_of(pure_run, batch_size=2)
    settings = {"until": [], "max_gen_toks": 5}
    found = lm.generate_until(
        [request(e, "generate_until", settings) for e in examples[:2]], disable_tqdm=True
    )
    model = Interlingua.from_pretrained(pure_run / "model")
    prompts = lm.reader.prompts.build_many([Turn(e.question) for e in examples[:2]], latent="pure")
    payloads = model.encode_payloads(
        [e.context for e in examples[:2]], [e.question for e in examples[:2]]
    )
    rows = Receiver.of(model, lm.reader).generate(
        prompts, payloads=payloads, options=DecodeOptions(max_new_tokens=5)
    )
    assert found == [lm.tok_decode(ids) for ids in rows]
    with pytest.raises(ConfigError, match="--apply_chat_template"):
        lm.apply_chat_template([{"role": "user", "content": "Who?"}])


def test_rolling_scores_need_text_mode(context_run: Path, examples: list[Example]) -> None:
    whole = Instance("loglikelihood_rolling", {}, (examples[0].context,), 0)
    with pytest.raises(ConfigError, match="run this task with mode=text"):
        model_of(context_run).loglikelihood_rolling([whole])
    (found,) = model_of(context_run, mode="text").loglikelihood_rolling([whole], disable_tqdm=True)
    assert found < 0


def test_other_fields_and_long_contexts(context_run: Path, examples: list[Example]) -> None:
    example = examples[-1]
    settings = {"until": [], "max_gen_toks": 2}
    lm = model_of(context_run, context_field="passage", chunk_length=40)
    lm.generate_until(
        [request(example, "generate_until", settings, field="passage")], disable_tqdm=True
    )
    (message,) = lm.contexts.of([(example.context, None)])
    assert len(message) > 1
    with pytest.raises(DataError, match=r"task 'a_task': .*'passage' holds no text"):
        lm.generate_until([request(example, "generate_until", settings)], disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "latent"}, "expected payload or text"),
        ({"reader": "gemma"}, r"this run has \['llama', 'qwen2'\]"),
        ({"reader": None}, r"this run has \['llama', 'qwen2'\]"),
        ({"bits": 5}, "bits=5, expected"),
        ({"mode": "text", "bits": 6}, "bits: without effect with mode=text"),
        ({"max_length": 9}, "max_length: without effect with mode=payload"),
        ({"batch_size": "auto"}, "give a number"),
        ({"peft": "x", "parallelize": True}, "unknown parallelize, peft"),
        ({"device": "tpu9"}, "no device"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    context_run: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(context_run, **options)


def test_a_task_that_samples_is_refused(context_run: Path, examples: list[Example]) -> None:
    settings = {"until": [], "do_sample": True, "temperature": 0.7}
    with pytest.raises(ConfigError, match="--gen_kwargs do_sample=False"):
        model_of(context_run).generate_until(
            [request(examples[0], "generate_until", settings)], disable_tqdm=True
        )


@pytest.mark.slow
def test_the_command(context_run: Path, tasks: Path, tmp_path: Path) -> None:
    args = f"pretrained={context_run},reader=llama,mode=payload,bits=6"
    command = [
        *(sys.executable, "-m", "latentwire_fast.evaluation.harness", "--model", "latentwire"),
        *("--model_args", args, "--tasks", "squad_like,mmlu_like", "--include_path", str(tasks)),
        *("--batch_size", "2", "--limit", "2", "--device", "cpu", "--apply_chat_template"),
        *("--output_path", str(tmp_path / "out")),
    ]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|squad_like|" in done.stdout.replace(" ", "")
    (results,) = (tmp_path / "out").rglob("results*.json")
    config = json.loads(results.read_text())["config"]
    assert config["latentwire_contexts"] == 2
    wrong = [part.replace("reader=llama", "reader=none") for part in command]
    done = subprocess.run(
        wrong, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: reader=none: this run has" in done.stderr.splitlines()[-1]
