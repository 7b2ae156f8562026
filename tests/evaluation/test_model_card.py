"""The card of an evaluated model: what the hub reads of it, and the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from latentwire_fast.evaluation.model_card import model_card
from runs import changed, tiny_config


def metrics_of(**scores: float) -> dict[str, Any]:
    """As much of an evaluation's metrics as a card has."""
    return {
        "run": {"name": "context", "commit": "abc", "config_sha256": "9f" * 32},
        "examples": 500,
        "latent": {"M": 12, "d_z": 16, "bits": 6, "group_size": 32},
        "bytes": {
            "text_utf8_mean": 177.8,
            "text_brotli_mean": 110.7,
            "payload_mean": {"16": 400.0, "8": 220.0, "6": 172.0, "4": 124.0},
        },
        "readers": {
            "llama": {
                **{method: {"f1": {"mean": mean}} for method, mean in scores.items()},
                "shuffled_latent": None,
            }
        },
    }


def test_the_hub_reads_library_tags_and_scores(llama_folder: Path) -> None:
    config = changed(tiny_config(llama_folder), data={"source": "/home/me/squad/dev.json[24:]"})
    text = model_card(config, metrics_of(text=0.987, latent=0.97604))
    card = ModelCard(text)
    assert card.data.library_name == "latentwire-fast"
    assert "prompt-compression" in card.data.tags
    found = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "F1, llama, full text": 98.7,
        "F1, llama, latent": 97.6,
    }
    latent = found["F1, llama, latent"]
    assert (latent.metric_type, latent.task_type) == ("f1", "question-answering")
    assert latent.dataset_name == "500 held-out examples of dev.json[24:]"
    assert "/home" not in text.split("---")[1]


def test_the_bytes_stand_beside_the_text(llama_folder: Path) -> None:
    text = model_card(tiny_config(llama_folder), metrics_of(text=1.0))
    for row in (
        "| text (UTF-8) | 178 | 100% |",
        "| text, compressed (brotli) | 111 | 62% |",
        "| payload, 6 bits | 172 | 97% |",
        "| payload, 4 bits | 124 | 70% |",
    ):
        assert row in text
