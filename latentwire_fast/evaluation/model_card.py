"""The model card of a run: README.md of its saved model, written from what was measured."""

from __future__ import annotations

from typing import Any

from latentwire_fast.config.schema import RunConfig


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
