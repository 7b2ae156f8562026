"""GGUF files as models of transformers: converted once, into a folder of the user's cache.

Unpacking the 4-bit blocks takes most of a minute, for 135 or 270 million weights on two cores;
reading them unpacked takes a second or two. The folder is an ordinary one (`save_pretrained`), and
its weights are exactly those of the file: each tensor has the shortest dtype that holds its values.
(Blocks of 4 bits need fp32: fp16 would change 42% of SmolLM2's Q4_1 weights and 63% of Gemma's
Q4_K_M, each by up to 1 part in 2,048.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import ggml
from transformers.utils import quantization_config

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.atomic import publish_folder
from latentwire_fast.files.user_cache import VARIABLE, one_at_a_time, user_cache
from latentwire_fast.readers.sources.pretrained import complete_model, quiet_transformers

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
MAGIC = b"GGUF"
CONVERSION = 1  # raised with every change of what a conversion writes

# How these vocabularies split texts, where transformers does not know it (`tokenizer.ggml.pre`).
_SPLITS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
}
# Metadata of tokens that end an answer, besides the EOS.
_FURTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def converted(file: Path) -> Path:
    """The folder with the model and the tokenizer of a GGUF file; made the first time.

    Raises:
        ConfigError: it is no such file, it cannot be converted, or there is no room for it.
    """
    with file.open("rb") as start:
        if start.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{str(file)!r} is no GGUF file: it does not begin with GGUF")
    status = file.stat()
    digest = _sha256(file.resolve(), status.st_size, status.st_mtime_ns)
    folder = user_cache("gguf") / f"{digest[:32]}-{CONVERSION}"
    if folder.exists():
        return folder
    with one_at_a_time(folder):
        if not folder.exists():
            _convert(file, folder)
    return folder


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file, once in a process; the file's size and time of change tell whether it is the
    same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(file: Path, folder: Path) -> None:
    facts = _Facts(file)
    if not knows_tokenizers():
        raise ConfigError(
            f"cannot read {str(file)!r}: transformers {transformers.__version__} makes another "
            "tokenizer of a GGUF file than the one in it; install transformers 5.18 or newer"
        )
    _check_room(file, folder.parent, 4 * facts.parameters)
    logger.info(
        "converting %s, once: about %.1f GB in %s", file.name, 4e-9 * facts.parameters, folder
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _ordinary(_dequantised(file, facts), facts).save_pretrained(temporary)
        _tokenizer(file, facts).save_pretrained(temporary)
        _drop_added(temporary / "tokenizer.json", known=len(facts.get("tokenizer.ggml.tokens")))
        publish_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_room(file: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{file.name} becomes a model of {needed / 1e9:.1f} GB, and {folder} has room for "
            f"{free / 1e9:.1f}; set {VARIABLE} to a folder with more"
        )


class _Facts:
    """What a GGUF file says of itself, read with the package `gguf`.

    Raises:
        ConfigError: the package is not installed, or cannot read the file.
    """

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConfigError(
                f"{file.name}: GGUF files are read with another package; run `pip install gguf`"
            ) from None
        try:
            reader = GGUFReader(file)
        except Exception as error:  # all kinds, on files that are cut off
            raise ConfigError(
                f"{str(file)!r} cannot be read as GGUF ({error}); is it complete?"
            ) from error
        self._fields = reader.fields
        self.names = [tensor.name for tensor in reader.tensors]
        self.parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)

    def get(self, key: str) -> Any:
        """A value of the metadata; None where there is none."""
        field = self._fields.get(key)
        return None if field is None else field.contents()


def _dequantised(file: Path, facts: _Facts) -> PreTrainedModel:
    """The model as transformers unpacks it, fp32, every weight of it from the file."""
    options: dict[str, Any] = {}
    packed = getattr(quantization_config, "GgufConfig", None)
    if packed is not None:  # since transformers 5.20 the blocks may stay packed, on a GPU
        options["quantization_config"] = packed(dequantize=True)
    model: PreTrainedModel = complete_model(
        AutoModelForCausalLM,
        file.parent,
        source=file,
        gguf_file=file.name,
        dtype=torch.float32,
        **options,
    )
    rotary = getattr(model.config, "rope_parameters", None) or {}
    if "rope_freqs.weight" in facts.names and rotary.get("rope_type") == "default":
        raise ConfigError(
            f"{str(file)!r} scales its rotary angles by a tensor (rope_freqs) that transformers "
            "does not read; give the model's Hugging Face folder"
        )
    return model


def _ordinary(model: PreTrainedModel, facts: _Facts) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF: that can be saved, and trained."""
    weights = {name: _shortest(weight) for name, weight in model.state_dict().items()}
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    ends = [config.eos_token_id, *map(facts.get, _FURTHER_ENDS)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > 1:
        fresh.generation_config.eos_token_id = ends
    return fresh


def _shortest(weight: Tensor) -> Tensor:
    """A weight in half precision where that changes no value."""
    for dtype in (torch.float16, torch.bfloat16):
        short = weight.to(dtype)
        if torch.equal(short.to(weight.dtype), weight):
            return short
    return weight


def knows_tokenizers() -> bool:
    """Whether this transformers makes the right tokenizer: before 5.18 one of the Llama kind took
    the beginning of a text for its end."""
    return not hasattr(ggml, "GGUFTokenizerSkeleton")


def _tokenizer(file: Path, facts: _Facts) -> Any:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    split = _SPLITS.get(facts.get("tokenizer.ggml.pre"))
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split()
    return tokenizer


def _drop_added(path: Path, *, known: int) -> None:
    """Take out of a saved tokenizer what is not in the file: transformers gives every byte-level
    vocabulary GPT-2's `<|endoftext|>`, behind the last row of the embedding."""
    saved = json.loads(path.read_text())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < known]
    path.write_text(json.dumps(saved, ensure_ascii=False))
