"""Pretrained weights and tokenizers: of a local folder, the hub, a GGUF file, or a package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from latentwire_fast.errors import ConfigError, LatentWireError
from latentwire_fast.readers.lora import merge_updates
from latentwire_fast.readers.sources import gguf_file, packages
from latentwire_fast.readers.sources.pretrained import complete_model

GISTS = "gists.safetensors"  # beside the low-rank updates of that baseline (`readers/gists.py`)
LONGEST_REASON = 300  # characters of a library's own message
SOURCES = "a local folder, a .gguf file, package:NAME, a hub id or testbed:NAME"


def load_weights(kind: Any, source: str | Path, **options: Any) -> Any:
    """A model of an `AutoModel` kind from its safetensors; weights that are pickles are not read.

    Raises:
        ConfigError: nothing to load there, or not all weights of the model.
    """
    with _loading(source) as path:
        if any(Path(path).glob("*.bin")) and not any(Path(path).glob("*.safetensors")):
            raise ConfigError(
                f"{path} holds weights as pickles (.bin), which are not read; load the model where "
                "you trust it, save it with `save_pretrained`, and give that folder"
            )
        if (Path(path) / GISTS).exists():
            raise ConfigError(
                f"{str(source)!r} is a baseline of gist tokens, and its updates are made to read "
                "those alone; give a reader that was trained without `--gists`"
            )
        model = complete_model(kind, path, source=source, use_safetensors=True, **options)
    if not getattr(model, "is_quantized", False):
        merge_updates(model)  # of a folder that holds a LoRA: from here on an ordinary model
    return model


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a source, as it was saved.

    `AutoTokenizer` prefers the class that goes with the model type, which puts that family's own
    pre-tokenizer in the place of the saved one; a tokenizer saved under the generic class is
    therefore loaded as such.

    Raises:
        ConfigError: nothing to load there.
    """
    with _loading(source) as path:
        declared = get_tokenizer_config(path).get("tokenizer_class")
        if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


@contextmanager
def _loading(source: str | Path) -> Iterator[str]:
    path = resolve_source(source)
    try:
        yield path
    except LatentWireError:
        raise
    except Exception as error:  # the libraries raise of all kinds on what they cannot read
        raise ConfigError(_refusal(source, error)) from error


def _refusal(source: str | Path, error: Exception) -> str:
    """What a library did not like about a source, in one sentence, with its own advice."""
    words = " ".join(str(error).split())
    if "trust_remote_code" in words:
        return (
            f"{str(source)!r} brings its own Python code, which is not run; give a model whose "
            "architecture transformers has itself"
        )
    if not isinstance(error, OSError | ValueError):  # a KeyError says no more than the key
        words = f"{type(error).__name__} {words}"
    return f"cannot load {str(source)!r} ({SOURCES}): {_shortened(words)}"


def _shortened(words: str) -> str:
    """A long message without its middle: what is wrong comes first, and what to do last."""
    if len(words) <= LONGEST_REASON:
        return words
    half = LONGEST_REASON // 2
    first, last = words[:half].rpartition(" ")[0], words[-half:].partition(" ")[2]
    return f"{first} ... {last}"


def resolve_source(source: str | Path) -> str:
    """The folder of `testbed:NAME`, of `package:NAME` or of a GGUF file, which is converted the
    first time; another folder or a hub id as it is.

    Raises:
        ConfigError: no such folder, file or package, or no shipped reader of that name.
    """
    text = str(source)
    path = Path(text)
    if text.startswith(packages.PREFIX):
        found = packages.package_file(text)
        return str(found if found.is_dir() else gguf_file.converted(found))
    if path.is_file():
        if path.suffix == gguf_file.SUFFIX:
            return str(gguf_file.converted(path))
        raise ConfigError(f"{text!r} is a file; give the folder that holds the model")
    if path.suffix == gguf_file.SUFFIX:
        raise ConfigError(f"cannot load {text!r}: no such file")
    if not path.exists() and (path.is_absolute() or text.startswith((".", "~"))):  # no hub id
        raise ConfigError(f"cannot load {text!r}: no such folder")
    if not text.startswith("testbed:"):
        return text
    folder = Path(__file__).parents[1] / "testbed" / "readers" / text.removeprefix("testbed:")
    if not (folder / "config.json").exists():
        known = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
        raise ConfigError(
            f"no shipped reader {text!r}; there are {[f'testbed:{k}' for k in known]}"
        )
    return str(folder)


def check_attention(implementation: str) -> None:
    """Raise, before any weights are loaded, where an attention is asked for that is not installed.

    Raises:
        ConfigError: flash attention without its package.
    """
    if implementation.startswith("flash_attention_2") and find_spec("flash_attn") is None:
        raise ConfigError(
            f"attn_implementation={implementation!r} needs the package flash-attn and a GPU; run "
            "`pip install --no-build-isolation flash-attn`, or take sdpa"
        )


def nf4_config(dtype: torch.dtype) -> Any:
    """bitsandbytes NF4 settings; a clear error where it is not installed."""
    # It says that a package `kernels` would be faster, which nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            "load_in_4bit needs the package bitsandbytes; run `pip install bitsandbytes`"
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
