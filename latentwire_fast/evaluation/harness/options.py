"""The model class's options: which there are, which have an effect in which mode."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from latentwire_fast.config.schema import ReaderConfig
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.run_folder import RunFolder

HarnessMode = Literal["payload", "text"]
# Options of the harness's own class, `hf`: in both modes, and in text mode alone.
SHARED_OPTIONS = ("chat_template_args", "max_batch_size")
TEXT_OPTIONS = (
    "add_bos_token",
    "enable_thinking",
    "logits_cache",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


def check_options(
    mode: str, own: dict[str, Any], batch_size: int | str, options: dict[str, Any]
) -> None:
    """Raise where an option cannot be, or would have no effect.

    Args:
        own: those about payloads; None where one is not given.
        options: those of `hf`.
    """
    if mode not in get_args(HarnessMode):
        raise ConfigError(f"mode={mode!r}, expected {' or '.join(get_args(HarnessMode))}")
    unknown = sorted(options.keys() - {*SHARED_OPTIONS, *TEXT_OPTIONS})
    if unknown:
        raise ConfigError(
            f"--model_args: unknown {', '.join(unknown)}; the model class takes pretrained, "
            f"reader, mode, {', '.join(own)}, dtype, imports, and of hf: "
            f"{', '.join((*SHARED_OPTIONS, *TEXT_OPTIONS))}"
        )
    if mode == "text":
        idle, other = [name for name, value in own.items() if value is not None], "payload"
    else:
        idle, other = sorted(options.keys() & {*TEXT_OPTIONS}), "text"
    if idle:
        raise ConfigError(
            f"{', '.join(idle)}: without effect with mode={mode}; leave it out, or take "
            f"mode={other}"
        )
    if mode == "payload" and str(batch_size).startswith("auto"):
        raise ConfigError("--batch_size auto works with mode=text only; give a number")


def reader_of(run: RunFolder, name: str | None) -> tuple[str, ReaderConfig]:
    """A reader of a run, by its name or because it is the only one.

    Raises:
        ConfigError, CheckpointError: no such run or reader.
    """
    readers = read_run_config(run.path).readers
    if name is None and len(readers) == 1:
        name = next(iter(readers))
    if name not in readers:
        raise ConfigError(f"reader={name}: this run has {sorted(readers)}; name one of them")
    return name, readers[name]


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one the accelerator that torch sees, or else the CPU.

    Raises:
        ConfigError: torch knows no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is no device; give cpu or cuda:NUMBER") from None
