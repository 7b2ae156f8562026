"""Pretrained weights and tokenizers: of a local folder, the hub, or a reader in the package."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from latentwire_fast.errors import ConfigError, LatentWireError
from latentwire_fast.readers.lora import merge_updates

logger = logging.getLogger(__name__)

NAMED = 3  # tensors that a message names
LONGEST_REASON = 300  # characters of a library's own message


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
        with _quiet_transformers():
            model, found = kind.from_pretrained(
                path,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that `found` lists them
                output_loading_info=True,
                **options,
            )
    _check_complete(model, found, source)
    if not getattr(model, "is_quantized", False):
        merge_updates(model)  # of a folder that holds a LoRA: from here on an ordinary model
    return model


def _check_complete(model: PreTrainedModel, found: Mapping[str, Any], source: str | Path) -> None:
    """Raise unless every weight came from the files: transformers draws the others at random."""
    name = type(model).__name__
    wrong = sorted(f"{key} is missing" for key in found["missing_keys"])
    wrong += sorted(
        f"{key} is {tuple(saved)}, not {tuple(wanted)}"
        for key, saved, wanted in found["mismatched_keys"]
    )
    if wrong:
        raise ConfigError(
            f"{str(source)!r} does not hold the weights of a {name}: {_first(wrong)}; save the "
            "model again with `save_pretrained`, or correct its config.json"
        )
    unused = sorted(found["unexpected_keys"])
    if unused and model.base_model is not model:  # a model without a head leaves out the head's
        logger.warning("%s: left out, not part of a %s: %s", source, name, _first(unused))


def _first(items: Sequence[str]) -> str:
    """A few of them, and how many there are."""
    rest = f", ... ({len(items)} in all)" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + rest


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own table of what it did not find; `_check_complete` says it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


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
        return AutoTokenizer.from_pretrained(path)


@contextmanager
def _loading(source: str | Path) -> Iterator[str]:
    path = resolve_source(source)
    try:
        yield path
    except LatentWireError:
        raise
    except Exception as error:  # the libraries raise of all kinds on what they cannot read
        reason = shorten(str(error), LONGEST_REASON, placeholder=" ...")
        if not isinstance(error, OSError | ValueError):  # a KeyError says no more than the key
            reason = f"{type(error).__name__} {reason}"
        raise ConfigError(
            f"cannot load {str(source)!r} (a local folder, a hub id or testbed:NAME): {reason}"
        ) from error


def resolve_source(source: str | Path) -> str:
    """`testbed:NAME` to the shipped folder; a folder or a hub id as it is.

    Raises:
        ConfigError: no such folder, or no shipped reader of that name.
    """
    text = str(source)
    path = Path(text)
    if path.is_file():
        raise ConfigError(f"{text!r} is a file; give the folder that holds the model")
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


def nf4_config(dtype: torch.dtype) -> Any:
    """bitsandbytes NF4 settings; a clear error where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError("load_in_4bit needs `pip install latentwire-fast[gpu]`") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
