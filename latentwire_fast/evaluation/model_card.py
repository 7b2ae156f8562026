"""The model card of a run: README.md of its saved model, written from what was measured."""

from __future__ import annotations

from typing import Any

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.evaluation.console import not_frozen
from latentwire_fast.evaluation.methods.base import evaluation_methods
from latentwire_fast.evaluation.report.formatting import percent


def model_card(config: RunConfig, metrics: dict[str, Any]) -> str:
    """The README.md of a saved model, written from what was measured."""
    latent, sizes = metrics["latent"], metrics["bytes"]
    width = str(latent["bits"])
    methods = {key: m.label for key, m in evaluation_methods().items() if m.in_model_card}
    rows = [
        ["reader", "source", *(label.lower() for label in methods.values())],
        ["---"] * (2 + len(methods)),
    ]
    for name, entry in metrics["readers"].items():
        scores = [percent((entry.get(key) or {}).get("f1")).text for key in methods]
        rows.append([name, config.readers[name].source, *scores])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
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
    dates = sorted({reader.date for reader in config.readers.values()})
    readers = (
        "The readers are frozen; the adapters work with exactly these weights and refuse others."
    )
    if metrics.get("lora"):
        trained = ". ".join(not_frozen(name, entry) for name, entry in metrics["lora"].items())
        readers = (
            f"{trained}. It is in `lora/`, in peft's format. Otherwise the readers are frozen: the "
            "adapters work with exactly their weights and refuse others."
        )
    found = (sizes.get("text_coded_mean") or {}).items()
    coded = "".join(f", {n:.1f} coded by {name}" for name, n in found if n is not None)
    size = latent["group_size"]
    groups = "" if size is None else f" in groups of {size}"
    return f"""---
library_name: latentwire-fast
tags: [prompt-compression, soft-prompt, latent]
---
# Interlingua `{metrics["run"]["name"]}` (preset `{config.preset}`)

{latent["M"]} latents of width {latent["d_z"]}, {width} bits{groups}:
{sizes["payload_mean"][width]:.0f} bytes on the wire for texts of
{sizes["text_utf8_mean"]:.0f} bytes (UTF-8; {sizes["text_brotli_mean"]:.0f} with brotli{coded}).
{meaning}{origin}

F1 on {metrics["examples"]} held-out examples of `{config.data.source}`:

{table}

{readers}
A chat template that names today's date was given {" or ".join(dates)} instead.
Trained by commit {metrics["run"]["commit"]}, configuration {metrics["run"]["config_sha256"][:12]}.
"""
