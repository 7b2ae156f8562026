"""Settings of a reader: its source, how its weights are loaded, and the names that it may have."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from latentwire_fast.config.base import require
from latentwire_fast.config.lora import LoraSettings
from latentwire_fast.config.prompt import PromptConfig

# Names that no reader may have: its name is a key of these two classes, beside "encoder".
_RESERVED_NAMES = {"encoder", *dir(nn.ModuleDict()), *dir(nn.ParameterDict())}


def check_reader_name(name: str) -> None:
    """Raise unless a reader can be called so.

    Raises:
        ConfigError: something but letters, digits, _ and -, or a name that has a meaning already.
    """
    require(
        re.fullmatch(r"\w[\w-]*", name) is not None,
        f"reader name {name!r}: give it one of letters, digits, _ and - that does not begin with -",
    )
    require(name not in _RESERVED_NAMES, f"reader name {name!r} is taken; give the reader another")


@dataclass(frozen=True)
class ReaderConfig(PromptConfig):
    """One frozen LLM, and how it is asked (the settings of `PromptConfig`).

    Attributes:
        source: a local folder, a .gguf file, `package:NAME`, a hub id or `testbed:NAME`.
        dtype: that the weights are loaded in; the reader is known by them.
        compute_dtype: that the weights are cast to afterwards; `auto` is bfloat16 where the device
            is fast at it; None leaves them.
        attn_implementation: `sdpa`, `eager`, or `flash_attention_2` (package flash-attn).
        device_map: of transformers: `auto` spreads the reader over the GPUs.
        max_memory: with a device map, what the reader may take: `20GiB` of each GPU, or named by
            device, `0=20GiB,1=40GiB,cpu=60GiB`; what is left then goes to disk.
        load_in_4bit: NF4 weights of bitsandbytes.
        lora: low-rank updates that are trained with the run: the reader is not frozen then. None
            for none.
    """

    source: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "sdpa"
    device_map: str | None = None
    load_in_4bit: bool = False
    max_memory: str | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    lora: LoraSettings | None = None

    @property
    def weights(self) -> ReaderConfig:
        """These settings as if it were asked in the usual way: what decides its weights."""
        changes: dict[str, Any] = {f.name: f.default for f in fields(PromptConfig)}
        return replace(self, **changes)
