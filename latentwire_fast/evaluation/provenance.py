"""The provenance of numbers: the `run` entry of metrics.json, and the model card of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.serialization import config_hash

PACKAGES = ("latentwire-fast", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def commit() -> str | None:
    """The commit of the source tree, with `+changes` if it is not clean; None outside a
    checkout."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers, and of `more` packages."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"


def command(module: str, run: str, **options: Any) -> str:
    """A command of the package on a run, as it is typed, with the folder `runs/NAME`.

    Args:
        module: with its subcommand, where it has one: `latentwire_fast.evaluate pattern`.
        run: the run's name.
        options: by the name of the argument. None, False and () are left out, True is a flag, and
            a sequence is given once per item.
    """
    words = ["--run", f"runs/{run}"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            items = value if isinstance(value, (list, tuple)) else [value]
            words += [word for item in items for word in (flag, str(item))]
    return f"python -m {module} {shlex.join(words)}"


def run_record(
    config: RunConfig, *, name: str, device: torch.device, eval_seed: int
) -> dict[str, Any]:
    """The `run` entry of metrics.json but for `command` and `wall_seconds`.

    Args:
        eval_seed: what the held-out examples were drawn with.
    """
    return {
        "name": name,
        "preset": config.preset,
        "mode": config.mode,
        "seed": config.seed,
        "eval_seed": eval_seed,
        "commit": commit(),
        "config_sha256": config_hash(config),
        "device": device_name(device),
        "versions": versions(),
    }
