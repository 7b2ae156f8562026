"""The public face: its names and their arguments, how they are imported, and that the pages run."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import latentwire_fast as lw
from latentwire_fast.errors import ConfigError
from runs import environment_on_the_cpu

ROOT = Path(__file__).parents[1]

# What users call. A change here is a change of the interface: say so in CHANGELOG.md.
SIGNATURES = {
    "Interlingua": (
        "(encoder: 'Encoder', readers: 'Mapping[str, ReaderCard]', *, bottleneck: "
        "'BottleneckConfig', attachments: 'Sequence[AttachmentConfig]', mode: 'Mode', "
        "private_slots: 'Mapping[str, int] | None' = None) -> 'None'"
    ),
    "Interlingua.from_pretrained": "(folder: 'str | Path', **options: 'Any') -> 'Interlingua'",
    "Interlingua.save_pretrained": (
        "(self, folder: 'str | Path', *, push_to_hub: 'bool' = False, repo_id: 'str | None' = "
        "None, **options: 'Any') -> 'Path'"
    ),
    "Interlingua.encode": (
        "(self, contexts: 'Sequence[str]', questions: 'Sequence[str] | None' = None) -> 'Tensor'"
    ),
    "Interlingua.encode_payloads": (
        "(self, contexts: 'Sequence[str]', questions: 'Sequence[str] | None' = None, *, "
        "bits: 'int | None' = None, reader: 'str | None' = None, "
        "answer_lengths: 'Sequence[int] | None' = None) -> 'list[bytes]'"
    ),
    "Interlingua.encode_chunks": (
        "(self, contexts: 'Sequence[str]', questions: 'Sequence[str] | None' = None, *, "
        "length: 'int | None' = None, bits: 'int | None' = None, reader: 'str | None' = "
        "None) -> 'list[tuple[bytes, ...]]'"
    ),
    "Interlingua.payloads": (
        "(self, latent_BMd: 'Tensor', *, bits: 'int | None' = None, reader: 'str | None' = "
        "None, slots: 'Sequence[int] | None' = None) -> 'list[bytes]'"
    ),
    "Interlingua.decode_payloads": (
        "(self, payloads: 'Sequence[bytes]', *, reader: 'str | None' = None) -> 'Tensor'"
    ),
    "Interlingua.quantize": ("(self, latent_BMd: 'Tensor', bits: 'int | None' = None) -> 'Tensor'"),
    "Interlingua.reader_inputs": (
        "(self, reader: 'str', latent_BMd: 'Tensor', *, gain: 'float' = 1.0, task: 'Task | "
        "None' = None, absent_BM: 'Tensor | None' = None) -> 'ReaderInputs'"
    ),
    "PromptBuilder": (
        "(tokenizer: 'PreTrainedTokenizerBase', config: 'PromptConfig | None' = None) -> 'None'"
    ),
    "PromptConfig": (
        "(*, template: 'str | None' = None, date: 'str' = '2024-07-26', anchor: "
        "\"Literal['text', 'chat', 'none']\" = 'text', anchor_text: 'str' = 'Answer:', bos: "
        "'bool | None' = None, append_bos_after_prefix: 'bool' = False) -> None"
    ),
    "PromptBuilder.build": (
        "(self, turns: 'Sequence[Turn]', *, context: 'str | None', latent: 'Mode | None' "
        "= None, user_ids: 'Sequence[int] | None' = None) -> 'Prompt'"
    ),
    "PromptBuilder.build_many": (
        "(self, turns: 'Sequence[Turn]', *, contexts: 'Sequence[str | None] | None' = "
        "None, latent: 'Mode | None' = None) -> 'list[Prompt]'"
    ),
    "Reader": (
        "(model: 'PreTrainedModel', tokenizer: 'Tokenizer', *, name: 'str', source: 'str'"
        " = '', prompt: 'PromptConfig | None' = None) -> 'None'"
    ),
    "Reader.load": (
        "(source: 'str | Path', *, name: 'str', dtype: 'torch.dtype' = torch.float32, "
        "device: 'str | torch.device | None' = None, device_map: 'Any' = None, "
        "attn_implementation: 'str' = 'sdpa', load_in_4bit: 'bool' = False, max_memory: "
        "'str | None' = None, prompt: 'PromptConfig | None' = None) -> 'Reader'"
    ),
    "Reader.score": (
        "(self, prompts: 'Sequence[Prompt]', *, prefixes: 'Sequence[Tensor] | Tensor | "
        "None' = None, deep: 'Tensor | None' = None, deep_lengths: 'Sequence[int] | None' "
        "= None, head: 'int' = 0, layers: 'LayerUpdates | None' = None, side: "
        "'PaddingSide' = 'right') -> 'TargetScores'"
    ),
    "Reader.decode": "(self, ids: 'Sequence[int]') -> 'str'",
    "ReaderConfig": (
        "(source: 'str', dtype: \"Literal['float32', 'bfloat16', 'float16']\" = 'float32', "
        "attn_implementation: 'str' = 'sdpa', device_map: 'str | None' = None, "
        "load_in_4bit: 'bool' = False, max_memory: 'str | None' = None, compute_dtype: "
        "\"Literal['float32', 'bfloat16', 'float16', 'auto'] | None\" = None, lora: "
        "'LoraSettings | None' = None, *, "
        "template: 'str | None' = None, date: 'str' = '2024-07-26', "
        "anchor: \"Literal['text', 'chat', 'none']\" = 'text', anchor_text: "
        "'str' = 'Answer:', bos: 'bool | None' = None, append_bos_after_prefix: 'bool' = "
        "False) -> None"
    ),
    "Receiver": (
        "(reader: 'Reader', adapter: 'nn.Module | None' = None, *, payload_kind: "
        "'PayloadKind | None' = None, deep_prefix: 'nn.Module | None' = None, layers: "
        "'nn.Module | None' = None, options: 'ReceiverOptions | None' = None) -> 'None'"
    ),
    "Receiver.of": (
        "(model: 'Interlingua', reader: 'Reader', *, options: 'ReceiverOptions | None' = "
        "None) -> 'Receiver'"
    ),
    "Receiver.for_text": (
        "(reader: 'Reader', *, options: 'ReceiverOptions | None' = None) -> 'Receiver'"
    ),
    "Receiver.prefill": (
        "(self, prompts: 'Sequence[Prompt]', *, payloads: 'Sequence[Message] | None' = "
        "None, embeddings: 'Sequence[Tensor] | None' = None) -> 'Prefilled'"
    ),
    "Receiver.generate": (
        "(self, prompts: 'Sequence[Prompt]', *, payloads: 'Sequence[Message] | None' = "
        "None, embeddings: 'Sequence[Tensor] | None' = None, options: 'DecodeOptions | "
        "None' = None, numbers: 'Sequence[int] | None' = None) -> 'list[list[int]]'"
    ),
    "Receiver.score": (
        "(self, prompts: 'Sequence[Prompt]', *, payloads: 'Sequence[Message] | None' = "
        "None, embeddings: 'Sequence[Tensor] | None' = None) -> 'TargetScores'"
    ),
    "RunConfig": (
        "(preset: 'str' = 'custom', base: 'str | None' = None, mode: 'Mode' = 'context', "
        "seed: 'int' = 0, threads: 'int | None' = None, readers: 'dict[str, ReaderConfig]' "
        "= <factory>, encoder: 'EncoderConfig' = <factory>, bottleneck: 'BottleneckConfig' "
        "= <factory>, attachments: 'tuple[AttachmentConfig, ...]' = <factory>, data: "
        "'DataConfig' = <factory>, stages: 'tuple[StageConfig, ...]' = (), optim: "
        "'OptimConfig' = <factory>, evaluation: 'EvalConfig' = <factory>, validation: "
        "'ValidationConfig | None' = None, log_every: 'int' = 10, save_every: 'int' = 200, "
        "minutes: 'float | None' = None, warm_start: 'dict[str, str]' = <factory>, "
        "loss_norms_every: 'int | None' = None, private_slots: 'dict[str, int]' = "
        "<factory>, trackers: 'tuple[str, ...]' = "
        "('tensorboard',)) -> None"
    ),
    "Turn": "(question: 'str', answer: 'str | None' = None) -> None",
    "evaluate": (
        "(run: 'str | Path', *, fresh_seed: 'int | None' = None, examples: 'int | None' ="
        " None, out: 'str | Path | None' = None, device: 'torch.device | str | None' = "
        "None, dtype: 'Dtype | None' = None, assignments: 'Sequence[str]' = (), "
        "reader_options: 'Sequence[str]' = (), progress: 'bool' = True, best: 'bool' = False) "
        "-> 'dict[str, Any]'"
    ),
    "load_preset": "(name: 'str') -> 'RunConfig'",
    "load_readers": (
        "(configs: 'Mapping[str, ReaderConfig]', device: 'torch.device | str | None' = "
        "None, *, dtype: 'str | None' = None) -> 'dict[str, Reader]'"
    ),
    "ops.LinearLosses": (
        "(cross_entropy: ForwardRef('Tensor'), kd: ForwardRef('Tensor'), correct: "
        "ForwardRef('Tensor'))"
    ),
    "ops.backend": "(name: 'Backend') -> 'Iterator[None]'",
    "ops.dequantize_project_calibrate": (
        "(codes: 'Tensor', scales: 'Tensor', *, bits: 'int', group_size: 'int', shape: "
        "'tuple[int, ...]', weight: 'Tensor', bias: 'Tensor | None' = None, norm_weight: "
        "'Tensor | None' = None, norm_bias: 'Tensor | None' = None, gamma: 'Tensor | "
        "None' = None, beta: 'Tensor | None' = None, target_rms: 'float | Tensor | None' "
        "= None, gain: 'float | Tensor' = 1.0, calibration: 'str' = 'token', groups: "
        "'int' = 1, tanh: 'bool' = False, dtype: 'torch.dtype | None' = None) -> 'Tensor'"
    ),
    "ops.fake_quantize": (
        "(z: 'Tensor', *, bits: 'int', group_size: 'int', clip: 'bool' = False) -> 'Tensor'"
    ),
    "ops.kd_kl": (
        "(student_logits: 'Tensor', teacher_logits: 'Tensor', *, tau: 'float' = 1.0, "
        "mask: 'Tensor | None' = None, reduction: 'Reduction' = 'mean', in_place: 'bool' "
        "= False) -> 'Tensor'"
    ),
    "ops.linear_cross_entropy_kd": (
        "(hidden: 'Tensor', labels: 'Tensor | None', weight: 'Tensor', *, bias: "
        "'Tensor | None' = None, teacher_hidden: 'Tensor | None' = None, "
        "teacher_weight: 'Tensor | None' = None, teacher_bias: 'Tensor | None' = None, "
        "label_weights: 'Tensor | None' = None, kd_weights: 'Tensor | None' = None, "
        "vocabulary: 'int | None' = None, scale: 'float' = 1.0, softcap: 'float | "
        "None' = None, label_smoothing: 'float' = 0.0, tau: 'float' = 1.0, "
        "cross_entropy_gradient: 'bool' = True, kd_gradient: 'bool' = True, "
        "chunk_rows: 'int | None' = None, reduction: 'Reduction' = 'sum') -> "
        "'LinearLosses'"
    ),
    "ops.linear_kd_kl": (
        "(student_hidden: 'Tensor', teacher_hidden: 'Tensor', weight: 'Tensor', *, "
        "teacher_weight: 'Tensor | None' = None, tau: 'float' = 1.0, mask: 'Tensor | "
        "None' = None, chunk_rows: 'int | None' = None, reduction: 'Reduction' = "
        "'mean', softcap: 'float | None' = None, bias: 'Tensor | None' = None, "
        "teacher_bias: 'Tensor | None' = None, vocabulary: 'int | None' = None, scale: "
        "'float' = 1.0) -> 'Tensor'"
    ),
    "ops.nearest_codes": "(rows: 'Tensor', codes: 'Tensor') -> 'Tensor'",
    "ops.project_calibrate": (
        "(x: 'Tensor', weight: 'Tensor', bias: 'Tensor | None' = None, *, norm_weight: "
        "'Tensor | None' = None, norm_bias: 'Tensor | None' = None, gamma: 'Tensor | "
        "None' = None, beta: 'Tensor | None' = None, target_rms: 'float | Tensor | None' "
        "= None, gain: 'float | Tensor' = 1.0, calibration: 'str' = 'token', groups: "
        "'int' = 1, tanh: 'bool' = False) -> 'Tensor'"
    ),
    "ops.quantize_pack": (
        "(z: 'Tensor', *, bits: 'int', group_size: 'int', clip: 'bool' = False) -> "
        "'tuple[Tensor, Tensor]'"
    ),
    "ops.unpack_dequantize": (
        "(codes: 'Tensor', scales: 'Tensor', *, bits: 'int', group_size: 'int', shape: "
        "'tuple[int, ...]', dtype: 'torch.dtype' = torch.float32) -> 'Tensor'"
    ),
    "train": (
        "(config: 'RunConfig', run: 'str | Path', *, evaluate: 'bool' = True, cache: "
        "'bool' = True, device: 'torch.device | str | None' = None, progress: 'bool' = "
        "True) -> 'dict[str, Any] | None'"
    ),
    "wire.Header": (
        "(*, bits: 'int', latents: 'int', d_z: 'int', group_size: 'int', fingerprint: "
        "'int' = 0, version: 'int' = 1) -> None"
    ),
    "wire.brotli_bytes": "(text: 'str') -> 'int'",
    "wire.pack": (
        "(latent_MD: 'Tensor', *, bits: 'int', group_size: 'int', fingerprint: 'int' = 0)"
        " -> 'bytes'"
    ),
    "wire.pack_batch": (
        "(latent_BMD: 'Tensor', *, bits: 'int', group_size: 'int', fingerprint: 'int' = "
        "0) -> 'list[bytes]'"
    ),
    "wire.payload_bytes": "(payload: 'bytes | Sequence[bytes]') -> 'int'",
    "wire.read_header": "(payload: 'bytes') -> 'Header'",
    "wire.read_payload_stream": "(stream: 'BinaryIO', *, name: 'str') -> 'Iterator[bytes]'",
    "wire.read_payloads": "(path: 'Path') -> 'Iterator[bytes]'",
    "wire.unpack": "(payload: 'bytes') -> 'tuple[Tensor, Header]'",
    "wire.unpack_batch": (
        "(payloads: 'Sequence[bytes]', *, device: 'torch.device | str' = 'cpu') -> "
        "'tuple[Tensor, list[Header]]'"
    ),
    "wire.utf8_bytes": "(text: 'str') -> 'int'",
    "wire.write_payloads": "(path: 'Path', payloads: 'Iterable[bytes]') -> 'int'",
}


def fences(text: str) -> list[str]:
    """The Python blocks of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands under a heading of a Markdown text, up to the next one of any level; empty if
    there is no such heading."""
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def in_a_fresh_process(code: str, folder: Path) -> str:
    """What the code prints in a process of its own, which has nothing imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment_on_the_cpu(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def public(name: str) -> Any:
    """What a dotted name of the public face stands for."""
    value: Any = lw
    for part in name.split("."):
        value = getattr(value, part)
    return value


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name: str) -> None:
    assert str(inspect.signature(public(name))) == SIGNATURES[name]


def test_every_public_name_has_its_signature_here() -> None:
    modules = {"ops", "wire"}
    assert modules < set(lw.__all__)
    assert {name.split(".")[0] for name in SIGNATURES} == set(lw.__all__)
    for module in modules:
        exported = public(module)
        functions = {n for n in exported.__all__ if callable(getattr(exported, n))}
        listed = {n.split(".")[1] for n in SIGNATURES if n.startswith(f"{module}.")}
        assert listed == functions, module


def test_every_public_name_is_listed_and_described() -> None:
    assert set(lw.__all__) <= set(dir(lw))
    assert sorted(lw.__all__) == [*lw.__all__]
    page = (ROOT / "docs" / "api.md").read_text()
    for name in lw.__all__:
        assert f"**`{name}`**" in page, f"docs/api.md does not describe {name}"
        assert f"lw.{name}" in page, f"docs/api.md has no line with {name}"


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="'latentwire_fast' has no attribute 'Interlinqua'"):
        _ = lw.Interlinqua
    assert not hasattr(lw, "__wrapped__")


# --- imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports",
    [
        "import latentwire_fast",
        "import latentwire_fast.train, latentwire_fast.evaluate",
        "import latentwire_fast\nlatentwire_fast.train\nimport latentwire_fast.train",
        "import latentwire_fast\nfrom latentwire_fast.train import train, main",
        "from latentwire_fast import train\nimport latentwire_fast",
        "import latentwire_fast\nlatentwire_fast.evaluate\nimport latentwire_fast.evaluation",
        "from latentwire_fast import *\nimport latentwire_fast",
    ],
)
def test_train_and_evaluate_are_functions_whatever_was_imported_before(
    imports: str, tmp_path: Path
) -> None:
    """And they are the modules that `python -m` runs."""
    code = f"""{imports}
import inspect
for name in ("train", "evaluate"):
    value = getattr(latentwire_fast, name)
    assert callable(value.main), name
    assert getattr(value, name) is not value
    print(inspect.signature(value) == inspect.signature(getattr(value, name)))
    try:
        value()
    except TypeError as error:
        print(error)
"""
    assert in_a_fresh_process(code, tmp_path).splitlines() == [
        "True",
        "train() missing 2 required positional arguments: 'config' and 'run'",
        "True",
        "evaluate() missing 1 required positional argument: 'run'",
    ]


def test_names_are_imported_when_they_are_used(tmp_path: Path) -> None:
    code = """
import importlib, sys
import latentwire_fast as lw
heavy = ("torch", "numpy", "transformers")
dir(lw), lw.__all__, lw.__version__, lw.train, lw.evaluate
assert not any(name in sys.modules for name in heavy)
lw.RunConfig
assert "torch" in sys.modules and "transformers" not in sys.modules
schema = importlib.import_module("latentwire_fast.config.schema")
print(lw.RunConfig is schema.RunConfig and "RunConfig" in vars(lw))
"""
    assert in_a_fresh_process(code, tmp_path) == "True\n"


def test_a_device_that_is_none(tmp_path: Path) -> None:
    for use in (
        lambda: lw.train(lw.load_preset("testbed_smoke"), tmp_path / "run", device="fast"),
        lambda: lw.evaluate(tmp_path, device="fast"),
    ):
        with pytest.raises(ConfigError, match=r"^device 'fast' is no device"):
            use()
    assert not any(tmp_path.iterdir())


def test_fresh_examples_are_never_written_over_the_runs_own_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fresh_seed needs out"):
        lw.evaluate(tmp_path, fresh_seed=3)


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lines_of_the_page_are_one_session(tmp_path: Path) -> None:
    """Every line of docs/api.md runs, in order; the first block is the README's example."""
    page = (ROOT / "docs" / "api.md").read_text()
    code = "\n".join(fences(page)) + "\nprint(sorted(metrics['readers']), latent.shape)\n"
    printed = in_a_fresh_process(code, tmp_path).splitlines()
    assert printed[0].startswith("42 bytes, answer: '")
    assert printed[1] == "['llama', 'qwen'] torch.Size([1, 4, 8])"
    assert json.loads((tmp_path / "metrics.json").read_text())["examples"] == 2


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    """From nothing to an answer in under ten lines; with six steps here, whose answer means
    nothing."""
    (code,) = fences(section((ROOT / "README.md").read_text(), "Use from Python"))
    assert len([line for line in code.splitlines() if line.strip()]) < 10
    assert "testbed_quick" in code
    printed = in_a_fresh_process(code.replace("testbed_quick", "testbed_smoke"), tmp_path)
    assert printed.startswith("42 bytes: ")


def test_the_example_has_ten_lines() -> None:
    first = fences((ROOT / "docs" / "api.md").read_text())[0]
    assert len([line for line in first.splitlines() if line.strip()]) == 10
