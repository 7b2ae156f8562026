"""What a sweep's table takes from one finished run: from its metrics.json, predictions.jsonl and
diagnostics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.records import read_records
from latentwire_fast.files.run_folder import RunFolder

TEXT_FORMS = ("utf8", "brotli", "zstd_dictionary")  # whose mean bytes a sweep's table has


def run_scores(folder: RunFolder) -> dict[str, Any]:
    """The scores of a finished run, as JSON.

    Returns:
        By `readers`: F1 of the latent and of the text, F1 by bits, that of text cut to as many
        bytes, NLL per token, bytes of the text coded by the reader. Besides: the bottleneck's kind,
        bytes of payloads and of texts, `effective_rank` and `pairwise_cosine` of the held-out
        latents, steps, `steps_per_second` of the training alone, parameters of the latent, and the
        digest of the configuration.

    Raises:
        ConfigError: the run has no readable metrics.json.
    """
    metrics = read_json(folder.metrics, error=ConfigError, advice="evaluate the run first")
    bits = str(metrics["latent"]["bits"])
    latent = (metrics.get("collapse") or {}).get("latent") or {}
    sizes = metrics["bytes"]
    payloads = sizes["payload_mean"]
    coded = sizes.get("text_coded_mean") or {}
    return {
        "readers": {
            name: _reader(entry) | {"coded_bytes": coded.get(name)}
            for name, entry in metrics["readers"].items()
        },
        "bottleneck": read_run_config(folder.path).bottleneck.kind,
        "text_bytes": {name: sizes.get(f"text_{name}_mean") for name in TEXT_FORMS},
        "latent": metrics["latent"],
        "bytes": payloads.get(bits),
        "bytes_by_bits": payloads,
        "effective_rank": latent.get("effective_rank"),
        "pairwise_cosine": latent.get("pairwise_cosine"),
        **_training(folder),
        "mode": metrics["run"]["mode"],
        "device": metrics["run"]["device"],
        "commit": metrics["run"]["commit"],
        "config_sha256": metrics["run"]["config_sha256"],
    }


def _reader(entry: Mapping[str, Any]) -> dict[str, Any]:
    def score(method: str, name: str) -> Any:
        return ((entry.get(method) or {}).get(name) or {}).get("mean")

    def by_bits(key: str) -> dict[str, float]:
        return {bits: found["f1"] for bits, found in (entry.get(key) or {}).items()}

    return {
        "f1": score("latent", "f1"),
        "text_f1": score("text", "f1"),
        "nll": score("latent", "nll_per_token"),
        "f1_by_bits": by_bits("latent_bits"),
        "cut_text_f1_by_bits": by_bits("byte_budget_bits"),
    }


def _training(folder: RunFolder) -> dict[str, Any]:
    """How long the training took, without what frozen models computed beforehand and without
    loading and scoring."""
    records = read_records(folder.diagnostics)
    if not records:
        return {"steps": None, "train_seconds": None, "steps_per_second": None}
    steps, seconds = records[-1]["step"] + 1, records[-1]["seconds"]
    return {
        "steps": read_run_config(folder.path).total_steps or steps,
        "train_seconds": seconds,
        "steps_per_second": steps / seconds if seconds else None,
    }


@dataclass(frozen=True)
class ExampleScores:
    """Scores of the latent for every held-out example of a run.

    Attributes:
        f1: by reader and by the example's id.
        nll: the same, of the whole gold answer, with its number of tokens; without the examples
            that have none.
        contexts: by the example's id; examples of one context are resampled together.
    """

    f1: dict[str, dict[str, float]]
    nll: dict[str, dict[str, tuple[float, int]]]
    contexts: dict[str, str]

    @classmethod
    def read(cls, folder: RunFolder) -> ExampleScores:
        """Those of a finished run."""
        found = cls({}, {}, {})
        with folder.predictions.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                key = record["id"]
                found.contexts[key] = record["context"]
                for name, methods in record["readers"].items():
                    latent = methods["latent"]
                    found.f1.setdefault(name, {})[key] = latent["f1"]
                    if "nll" in latent:
                        found.nll.setdefault(name, {})[key] = latent["nll"], latent["tokens"]
        return found
