"""The model card of a run: README.md of its saved model, written from what was measured."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.evaluation.console import not_frozen
from latentwire_fast.evaluation.methods.base import evaluation_methods
from latentwire_fast.evaluation.report.formatting import percent
from latentwire_fast.models.hub import LIBRARY, TAGS


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
{_card_data(config, metrics, methods)}
---
# Interlingua `{metrics["run"]["name"]}` (preset `{config.preset}`)

{latent["M"]} latents of width {latent["d_z"]}, {width} bits{groups}:
{sizes["payload_mean"][width]:.0f} bytes on the wire for texts of
{sizes["text_utf8_mean"]:.0f} bytes (UTF-8; {sizes["text_brotli_mean"]:.0f} with brotli{coded}).
{meaning}{origin}

F1 on {metrics["examples"]} held-out examples of `{config.data.source}`:

{table}

{_bytes_table(metrics)}

{readers}
A chat template that names today's date was given {" or ".join(dates)} instead.
Trained by commit {metrics["run"]["commit"]}, configuration {metrics["run"]["config_sha256"][:12]}.
"""


def _card_data(config: RunConfig, metrics: dict[str, Any], methods: dict[str, str]) -> str:
    """What the hub reads of a card, as YAML: library, tags, and scores as a model index."""
    # Names of files and sets: where they are on this machine is nobody's business.
    place = re.sub(r"[^+,=]*/", "", config.data.eval_source or config.data.source)
    data = ModelCardData(
        library_name=LIBRARY,
        tags=[*TAGS],
        model_name=metrics["run"]["name"] or "latentwire",
        eval_results=[
            EvalResult(
                task_type="question-answering",
                task_name="Question answering",
                dataset_type=re.sub(r"[^\w.+-]+", "-", place),
                dataset_name=f"{metrics['examples']} held-out examples of {place}",
                metric_type="f1",
                metric_name=f"F1, {name}, {label.lower()}",
                metric_value=round(100 * entry[key]["f1"]["mean"], 2),
            )
            for name, entry in metrics["readers"].items()
            for key, label in methods.items()
            if entry.get(key)
        ],
    )
    return data.to_yaml().strip()


def _bytes_table(metrics: dict[str, Any]) -> str:
    """Bytes of a text, and of its payload at each width, on average."""
    sizes = metrics["bytes"]
    text = sizes["text_utf8_mean"]
    named = {
        "text (UTF-8)": text,
        "text, compressed (brotli)": sizes["text_brotli_mean"],
        **{f"payload, {bits} bits": mean for bits, mean in sizes["payload_mean"].items()},
    }
    rows = ["| sent | bytes | of the text |", "| --- | --- | --- |"]
    rows += [f"| {name} | {mean:.0f} | {mean / text:.0%} |" for name, mean in named.items()]
    return "\n".join(rows)
