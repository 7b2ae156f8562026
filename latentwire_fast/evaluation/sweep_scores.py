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


def run_scores(folder: RunFolder) -> dict[str, Any]:
    """The scores of a finished run, as JSON.

    Returns:
        By `readers`: F1 of the latent and of the text, F1 by bits, NLL per token. Besides: bytes,
        `effective_rank` and `pairwise_cosine` of the held-out latents, steps, `steps_per_second`
        of the training alone, parameters of the latent, and the digest of the configuration.

    Raises:
        ConfigError: the run has no readable metrics.json.
    """
    metrics = read_json(folder.metrics, error=ConfigError, advice="evaluate the run first")
    bits = str(metrics["latent"]["bits"])
    payloads = metrics["bytes"]["payload_mean"]
    latent = (metrics.get("collapse") or {}).get("latent") or {}
    return {
        "readers": {name: _reader(entry) for name, entry in metrics["readers"].items()},
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

    return {
        "f1": score("latent", "f1"),
        "text_f1": score("text", "f1"),
        "nll": score("latent", "nll_per_token"),
        "f1_by_bits": {b: found["f1"] for b, found in (entry.get("latent_bits") or {}).items()},
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
    """F1 of the latent for every held-out example of a run.

    Attributes:
        f1: by reader and by the example's id.
        contexts: by the example's id; examples of one context are resampled together.
    """

    f1: dict[str, dict[str, float]]
    contexts: dict[str, str]

    @classmethod
    def read(cls, folder: RunFolder) -> ExampleScores:
        """Those of a finished run."""
        f1: dict[str, dict[str, float]] = {}
        contexts = {}
        with folder.predictions.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                contexts[record["id"]] = record["context"]
                for name, methods in record["readers"].items():
                    f1.setdefault(name, {})[record["id"]] = methods["latent"]["f1"]
        return cls(f1, contexts)
