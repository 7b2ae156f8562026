"""Positions chosen for each text, as many as its length asks for: encoder, targets, receiver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.selected import best_places
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import POOLERS
from latentwire_fast.serving import Receiver
from receiving import asking
from runs import assert_resumes, deep, soft, tiny_config, train
from varying import LATENTS, TEXTS, encoder_of

SELECTED: dict[str, Any] = {
    "pooler": POOLERS.config("selected"), "frozen": True, "latents": 5, "d_z": 8,
    "tokens_per_latent": 7.0,
}  # fmt: skip


def test_a_row_gets_its_own_number_of_places() -> None:
    scores = torch.tensor([[0.1, 3.0, -torch.inf, 2.0, 0.5], [5.0, 1.0, 2.0, 3.0, 4.0]])
    places = best_places(scores, 3, counts_B=torch.tensor([3, 2]))
    assert places.tolist() == [[1, 3, 4], [0, 4, 4]]
    assert best_places(scores, 3, counts_B=torch.tensor([1, 1])).tolist() == [[1] * 3, [0] * 3]


@torch.no_grad()
def test_the_best_positions_of_each_text(reader: Reader) -> None:
    encoder = encoder_of(reader, "selected")
    counts = encoder.latent_counts(TEXTS)
    assert counts is not None
    latent, selection = encoder.select(TEXTS)
    assert torch.equal(latent, encoder(TEXTS))
    rows = zip(selection.scores_BT, selection.places_BM, counts, latent, strict=True)
    for scores, places, count, of_text in rows:
        assert places[:count].tolist() == sorted(scores.topk(count).indices.tolist())
        assert places[count:].tolist() == [places[count - 1]] * (LATENTS - count)
        assert not of_text[count:].any()


def config_of(folder: Path, **objectives: float) -> RunConfig:
    """Passages of one to four facts."""
    return tiny_config(
        folder,
        attachments=(soft(expansion=1), deep(width=16, heads=2, expansion=2)),
        data={"facts": 4, "eval_examples": 4},
        encoder=SELECTED,
        stages=(StageConfig("match", steps=2, objectives=weighted(**objectives)),),
    )


@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_is_trained_resumed_and_read(llama_folder: Path, tmp_path: Path) -> None:
    config = config_of(llama_folder, select=1.0, kv=1.0, answer=1.0)
    whole = train(config, tmp_path / "whole")
    assert_resumes(config, tmp_path / "cut", whole)
    session = whole.session
    (stage,), stream = session.config.stages, session.stream

    # A text's losses are its own, whatever number of positions the others of its batch get.
    items = [stream.batch(0, 1, facts=facts)[0] for facts in (1, 2, 4)]
    prepared = session.objectives.prepare(items, stage, ["llama"])
    contexts = [item.context for item in items]
    assert len({*(session.model.encoder.latent_counts(contexts) or ())}) > 1
    counts = {(kind, "llama"): 1 for kind in ("select", "kv", "answer")}
    together = session.objectives.compute(prepared, stage, counts)
    alone = [session.objectives.compute([item], stage, counts) for item in prepared]
    for key, value in together.sums.items():
        torch.testing.assert_close(value, torch.stack([one.sums[key] for one in alone]).sum())
    together.total.backward()
    pooler = session.model.encoder.pooler  # type: ignore[attr-defined]
    for part in ("scores", "mixes"):
        assert all(p.grad.abs().max() > 0 for p in getattr(pooler, part).parameters())

    # Payloads of their own sizes, which a receiver reads in a batch as one by one.
    model, reader = Interlingua.from_pretrained(whole.folder.model), session.readers["llama"]
    payloads = model.encode_payloads(contexts)
    assert payloads == session.model.eval().encode_payloads(contexts)
    assert len({*map(len, payloads)}) > 1
    receiver, prompts = Receiver.of(model, reader), asking(reader, ["Where?"] * 3)
    together_BV = receiver.prefill(prompts, payloads=payloads).logits_BV
    for row, payload in enumerate(payloads):
        alone_BV = receiver.prefill(prompts[:1], payloads=[payload]).logits_BV
        torch.testing.assert_close(together_BV[row], alone_BV[0], rtol=1e-4, atol=1e-4)
