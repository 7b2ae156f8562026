"""Where a number comes from: the `run` entry of metrics.json, and the model card of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from latentwire_fast.config import RunConfig
from latentwire_fast.stored_config import config_hash

PACKAGES = ("latentwire-fast", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def commit() -> str | None:
    """The commit of the source tree, with `+changes` if it is not clean; None outside a
    checkout."""
    root = Path(__file__).parent

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


def run_record(
    config: RunConfig, *, name: str, device: torch.device, eval_seed: int
) -> dict[str, Any]:
    """The `run` entry of metrics.json but for `wall_seconds`.

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


def model_card(config: RunConfig, metrics: dict[str, Any]) -> str:
    """The README.md of a saved model, written from what was measured."""
    latent, sizes = metrics["latent"], metrics["bytes"]
    width = str(latent["bits"])
    rows = "\n".join(
        f"| {name} | {config.readers[name].source} | {_points(entry['text'])} | "
        f"{_points(entry['latent'])} | {_points(entry['token_budget'])} | "
        f"{_points(entry['shuffled_latent'])} |"
        for name, entry in metrics["readers"].items()
    )
    meaning = {
        "pure": "The latent stands for the whole prompt, question included: the encoder may answer "
        "and send the answer, so these scores say nothing about compression.",
        "context": "The latent stands for the context alone; the question reaches the reader as "
        "text.",
    }[config.mode]
    origin = ""
    if config.base:
        origin = (
            f" The encoder is that of `{config.base}`, unchanged: these readers were added to it, "
            "and read its payloads."
        )
    return f"""---
library_name: latentwire-fast
tags: [prompt-compression, soft-prompt, latent]
---
# Interlingua `{metrics["run"]["name"]}` (preset `{config.preset}`)

{latent["M"]} latents of width {latent["d_z"]}, {width} bits in groups of {latent["group_size"]}:
{sizes["payload_mean"][width]:.0f} bytes on the wire for texts of
{sizes["text_utf8_mean"]:.0f} bytes (UTF-8; {sizes["text_brotli_mean"]:.0f} with brotli).
{meaning}{origin}

F1 on {metrics["examples"]} held-out examples of `{config.data.source}`:

| reader | source | text | latent | token budget | shuffled latent |
|---|---|---|---|---|---|
{rows}

The readers are frozen; the adapters work with exactly these weights and refuse others.
Trained by commit {metrics["run"]["commit"]}, configuration {metrics["run"]["config_sha256"][:12]}.
"""


def _points(entry: dict[str, Any]) -> str:
    return f"{100 * entry['f1']['mean']:.1f}"
