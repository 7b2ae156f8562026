"""Objectives on latents alone, with a head of their own or without, against plain formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.config.schema import Mode, ObjectiveConfig, RunConfig, StageConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.text_model import TextModel
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.objectives.prepared import total_counts
from latentwire_fast.prompts.builder import encoded_text, replaced_text
from latentwire_fast.registry import POOLERS
from runs import changed, deep, soft, tiny_config
from stage_batches import StageBatch, assert_cut_alike, objective

HEADS: dict[str, dict[str, Any]] = {
    "contrastive": {"width": 16},
    "reconstruct": {"width": 16, "heads": 2},
    "gist": {"width": 16, "heads": 2},
    "align_readers": {"width": 8},
    "semantic_anchor": {"source": "BERT"},
}


@pytest.fixture(scope="module", params=["context", "pure"])
def batch(
    request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path, bert_folder: Path
) -> StageBatch:
    objectives = tuple(
        objective(kind, **settings).map_sources(lambda _: str(bert_folder))
        for kind, settings in HEADS.items()
    )
    stages = (StageConfig("s", steps=1, objectives=objectives),)
    return StageBatch.of(
        llama_folder,
        qwen_folder,
        mode=request.param,
        attachments=(soft("linear"),),
        stages=stages,
    )


def assert_reaches(batch: StageBatch, head: str | None) -> None:
    """The gradients reach the encoder and the head, and no attachment."""
    found = {name for name, gradient in batch.gradients().items() if gradient.abs().sum() > 0}
    assert any(name.startswith("encoder.") for name in found)
    assert not any(name.startswith("attachments.") for name in found)
    expected = {n for n, _ in batch.model.named_parameters() if n.startswith(f"heads.{head}.")}
    assert expected <= found
    assert bool(expected) == (head is not None)


@pytest.mark.parametrize("form", ["infonce", "margin"])
def test_a_latent_is_told_by_its_text(batch: StageBatch, form: str) -> None:
    config = objective("contrastive", form=form, width=16, window=4, margin=0.5)
    torch.manual_seed(0)
    losses = batch.compute(config)[0]
    assert_reaches(batch, "contrastive")
    torch.manual_seed(0)
    items = batch.prepare(StageConfig("s", steps=1, objectives=(config,)))
    read = batch.reader_batch("llama", config)
    latent = read.encoded.sent_BMd
    for name, reader in batch.readers.items():
        head: Any = batch.model.heads["contrastive"][name]  # type: ignore[index]
        ours = F.normalize(head.latent(latent), dim=-1)
        fits = torch.zeros(5, 5)
        for b, item in enumerate(items):
            ids = item.prompts["contrastive", name].ids
            text = reader.embedding.weight[ids].mean(0) / reader.embedding_rms
            theirs = F.normalize(head.text(text), dim=-1)
            fits[:, b] = 0.1 * ((ours @ theirs / 0.1).exp().mean(1)).log()
        expected = 0.0
        for b, item in enumerate(items):
            others = [o for o in range(5) if items[o].item.context != item.item.context]
            if form == "margin":
                over = [max(0.0, (0.5 + fits[b, o] - fits[b, b]).item()) for o in others]
                expected += sum(over) / len(over)
            else:
                for line in (fits[b], fits[:, b]):
                    kept = torch.stack([line[b], *(line[o] for o in others)]) / 0.1
                    expected -= kept.log_softmax(0)[0].item() / 2
        assert losses.sums["contrastive", name].item() == pytest.approx(expected, rel=1e-4)
        assert 0 <= losses.measures["contrastive_accuracy", name].item() <= 1


def test_a_piece_is_of_the_text_that_is_sent(batch: StageBatch) -> None:
    stage = StageConfig("s", steps=1, objectives=(objective("contrastive", window=3),))
    seen = set()
    for _ in range(4):
        for item in batch.prepare(stage):
            text = replaced_text(item.item.context, item.item.question, mode=batch.model.mode)
            ids = batch.readers["llama"].prompts.text_ids(text)
            piece = item.prompts["contrastive", "llama"].ids
            assert any(ids[i : i + 3] == piece for i in range(len(ids)))
            seen.add(tuple(piece))
    assert len(seen) > len(batch.items), "drawn anew"


@pytest.mark.parametrize("form", ["mse", "cosine"])
def test_embeddings_come_back(batch: StageBatch, form: str) -> None:
    """One text at a time, without padding: 6 of its tokens at even distances."""
    config = objective("reconstruct", form=form, tokens=6, width=16, heads=2)
    losses = batch.compute(config)[0]
    assert_reaches(batch, "reconstruct")
    latent = batch.reader_batch("llama", config).encoded.sent_BMd
    for name, reader in batch.readers.items():
        decoder = batch.model.heads["reconstruct"][name]  # type: ignore[index]
        expected = 0.0
        for b, item in enumerate(batch.items):
            text = replaced_text(item.context, item.question, mode=batch.model.mode)
            ids = reader.prompts.text_ids(text)
            at = [i * len(ids) // 6 for i in range(6)]
            places = torch.tensor([at])
            ours = decoder(latent[b : b + 1], places, torch.ones(1, 6, dtype=torch.bool))[0]
            theirs = reader.embedding.weight[[ids[i] for i in at]] / reader.embedding_rms
            if form == "mse":
                found = (ours - theirs).square().mean(1) / theirs.square().mean(1)
            else:
                found = 1 - F.cosine_similarity(ours, theirs, dim=1)
            expected += found.sum().item()
        assert losses.sums["reconstruct", name].item() == pytest.approx(expected, rel=1e-4)
        assert len(ids) > 6
    assert_cut_alike(batch, config)


def test_the_gist_is_a_bag_of_tokens(batch: StageBatch) -> None:
    config = objective("gist", mask=0.0, width=16, heads=2)
    losses = batch.compute(config)[0]
    assert_reaches(batch, "gist")
    latent = batch.reader_batch("llama", config).encoded.sent_BMd
    for name, reader in batch.readers.items():
        vectors = batch.model.heads["gist"][name](latent)  # type: ignore[index]
        expected, count = 0.0, 0
        for b, item in enumerate(batch.items):
            text = replaced_text(item.context, item.question, mode=batch.model.mode)
            ids = sorted(set(reader.prompts.text_ids(text)))
            mean = reader.output_head.logits(vectors[b]).softmax(-1).mean(0)
            expected -= mean[ids].log().sum().item()
            count += len(ids)
        assert losses.sums["gist", name].item() == pytest.approx(expected, rel=1e-4)
        assert losses.total.item() > 0
    assert_cut_alike(batch, config)


def test_masked_tokens_are_not_asked_for(batch: StageBatch) -> None:
    stage = StageConfig("s", steps=1, objectives=(objective("gist", mask=0.5),))
    first, second = (batch.prepare(stage) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        text = set(a.prompts["content", "llama"].ids)
        asked = [p.prompts["gist", "llama"].ids for p in (a, b)]
        assert set(asked[0]) < text
        assert a.counts["gist", "llama"] == len(set(asked[0])) == round(len(text) / 2)
        assert asked[0] != asked[1], "drawn anew"


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_the_window_is_the_tokens_around_each_position(
    mode: Mode, llama_folder: Path, qwen_folder: Path
) -> None:
    """The encoder cuts texts as `llama` does; its positions are moved to `qwen`'s tokens."""
    config = objective("window", before=12, behind=9, width=16)
    batch = StageBatch.of(
        llama_folder,
        qwen_folder,
        mode=mode,
        encoder={"pooler": POOLERS.config("selected")},
        attachments=(soft("linear"),),
        stages=(StageConfig("s", steps=1, objectives=(objective("select"), config)),),
    )
    losses = batch.compute(config)[0]
    assert_reaches(batch, "window")
    questions = tuple(item.question for item in batch.items) if mode == "pure" else None
    contexts = tuple(item.context for item in batch.items)
    latent, selection = batch.model.encoder.select(contexts, questions)
    for name, reader in batch.readers.items():
        head: Any = batch.model.heads["window"][name]  # type: ignore[index]
        expected, outside = 0.0, 0
        for b, item in enumerate(batch.items):
            text = encoded_text(item.context, item.question if mode == "pure" else None)
            own = batch.readers["llama"].prompts.text_ends(text)
            ids, ends = reader.prompts.text_ids(text), reader.prompts.text_ends(text)
            terms = []
            for m, place in enumerate(selection.places_BM[b].tolist()):
                at = next(i for i, end in enumerate(ends) if end >= own[place])
                for k, vector in enumerate(head(latent[b, m])):
                    if 0 <= at + k - 12 < len(ids):
                        log = reader.output_head.logits(vector[None]).log_softmax(-1)[0]
                        terms.append(-log[ids[at + k - 12]].item())
                    else:
                        outside += 1
            expected += sum(terms) / len(terms)
        assert losses.sums["window", name].item() == pytest.approx(expected, rel=1e-4)
        assert outside > 0
    assert_cut_alike(batch, config)


@pytest.mark.parametrize("form", ["texts", "slots", "covariance"])
def test_latents_that_are_alike_cost(batch: StageBatch, form: str) -> None:
    config = objective("diversity", form=form, std=0.9, covariance=0.5)
    losses = batch.compute(config)[0]
    assert_reaches(batch, None)
    assert set(losses.sums) == {("diversity", "llama")}, "once, however many readers"
    latent = batch.reader_batch("llama", config).encoded.sent_BMd.detach()
    texts, slots, width = latent.shape
    keys = [(i.context, i.question if batch.model.mode == "pure" else "") for i in batch.items]
    expected = 0.0
    if form == "covariance":
        for m in range(slots):
            matrix = torch.cov(latent[:, m].T)
            spread = (matrix.diagonal() + 1e-4).sqrt()
            off = matrix - torch.diag(matrix.diagonal())
            found = (0.9 - spread).clamp(min=0).mean() + 0.5 * off.square().sum() / width
            expected += texts * found.item() / slots
    for b in range(texts if form != "covariance" else 0):
        for m in range(slots):
            others = [(b, n) for n in range(slots) if n != m]
            if form == "texts":
                others = [(o, m) for o in range(texts) if keys[o] != keys[b]]
            rows = torch.stack([latent[place] for place in others])
            cosines = F.cosine_similarity(latent[b, m][None], rows, dim=1)
            expected += cosines.square().mean().item() / slots
    assert losses.total.item() == pytest.approx(expected / texts, rel=1e-4)
    one = StageBatch(batch.model, batch.readers, batch.items[:1])
    if form != "slots":
        assert one.compute(config)[0].total.item() == 0.0
    else:
        assert_cut_alike(batch, config)


def test_readers_are_drawn_together(batch: StageBatch) -> None:
    config = objective("align_readers", width=8)
    losses = batch.compute(config)[0]
    read = batch.reader_batch("llama", config)
    mapped = []
    for name, reader in batch.readers.items():
        soft_tokens = batch.model.prefix(name, read.encoded.sent_BMd) / reader.embedding_rms
        part: Any = batch.model.heads["align_readers"][name]  # type: ignore[index]
        identity = part.map_DW.T @ part.map_DW
        torch.testing.assert_close(identity, torch.eye(8), rtol=0, atol=1e-5)
        mapped.append(soft_tokens @ part.map_DW)
    first, second = mapped
    expected = (first - second).square().mean().item() / 4
    assert losses.total.item() == pytest.approx(expected, rel=1e-4)
    found = {name for name, gradient in batch.gradients().items() if gradient.abs().sum() > 0}
    for name in batch.readers:
        assert any(key.startswith(f"attachments.{name}.") for key in found), "both are drawn"
    assert any(key.startswith("encoder.") for key in found)
    assert not any(key.startswith("heads.") for key in found), "the maps are fixed"
    assert_cut_alike(batch, config)


def test_readers_are_drawn_together_where_they_share_slots(
    llama_folder: Path, qwen_folder: Path
) -> None:
    """A reader with a slot of its own has one soft token more than the other."""
    config = objective("align_readers", width=8)
    stage = StageConfig("s", steps=1, objectives=(config,))
    batch = StageBatch.of(
        llama_folder, qwen_folder, stages=(stage,), private_slots={llama_folder.name: 1}
    )
    assert batch.compute(config)[0].total.item() > 0


def test_soft_tokens_are_drawn_to_the_mean(batch: StageBatch) -> None:
    config = objective("align_mean")
    losses = batch.compute(config)[0]
    latent = batch.reader_batch("llama", config).encoded.sent_BMd
    for name, reader in batch.readers.items():
        expected = 0.0
        for b, item in enumerate(batch.items):
            text = replaced_text(item.context, item.question, mode=batch.model.mode)
            wanted = reader.embedding.weight[reader.prompts.text_ids(text)].mean(0)
            error = batch.model.prefix(name, latent[b : b + 1])[0] - wanted
            expected += error.square().mean().item() / reader.embedding_rms**2
        assert losses.sums["align_mean", name].item() == pytest.approx(expected, rel=1e-4)
    assert_cut_alike(batch, config)


@pytest.mark.parametrize("form", ["mse", "cosine"])
def test_latents_are_drawn_to_a_sentence_vector(
    batch: StageBatch, form: str, bert_folder: Path
) -> None:
    config = objective("semantic_anchor", source=str(bert_folder), form=form)
    losses = batch.compute(config)[0]
    assert_reaches(batch, "semantic_anchor")
    latent = batch.reader_batch("llama", config).encoded.sent_BMd
    anchor = TextModel.of(str(bert_folder))
    assert sum(p.numel() for p in batch.model.heads["semantic_anchor"].parameters()) == 32 * 9
    expected = 0.0
    for b, item in enumerate(batch.items):
        question = item.question if batch.model.mode == "pure" else None
        ids = anchor.text.ids(encoded_text(item.context, question))
        wanted = F.layer_norm(anchor.run([ids], [2])[0][0].mean(0), (32,))
        found = batch.model.heads["semantic_anchor"](latent[b].mean(0))
        if form == "mse":
            expected += ((found - wanted).square().mean() / wanted.square().mean()).item()
        else:
            expected += 1 - F.cosine_similarity(found, wanted, dim=0).item()
    assert losses.total.item() == pytest.approx(expected / 5, rel=1e-4)
    assert_cut_alike(batch, config)


def test_controls_check_the_run(llama_folder: Path, qwen_folder: Path) -> None:
    for kind, options, message in (
        ("align_readers", {}, "'align_readers' needs two readers at least, and an attachment"),
        ("align_mean", {"attachments": (deep(width=16, heads=2),)}, "needs an attachment 'soft'"),
    ):
        stage = StageConfig("s", steps=1, objectives=(objective(kind),))
        with pytest.raises(ConfigError, match=message):
            tiny_config(llama_folder, stages=(stage,), **options)
    stage = StageConfig("s", steps=1, objectives=(objective("align_readers", width=40),))
    with pytest.raises(ConfigError, match="width=40, and the narrowest reader has 32; give that"):
        StageBatch.of(llama_folder, qwen_folder, stages=(stage,))


@pytest.mark.parametrize("bits", [None, 6])
def test_one_reader_after_the_other_gives_the_same_gradients(
    batch: StageBatch, bert_folder: Path, bits: int | None
) -> None:
    """All of them at once, with the answers."""
    kinds = {**HEADS, "align_mean": {}, "diversity": {}, "answer": {}}
    objectives = tuple(
        objective(kind, **settings).map_sources(lambda _: str(bert_folder))
        for kind, settings in kinds.items()
    )
    stage = StageConfig("s", steps=1, objectives=objectives, quantize=bits)
    items = batch.prepare(stage)
    parts = ObjectiveSet(batch.model, batch.readers)
    found = []
    for backward in (None, Tensor.backward):
        batch.model.zero_grad(set_to_none=True)
        losses = parts.compute(items, stage, total_counts(items), backward=backward)
        if backward is None:
            losses.total.backward()
        found.append(batch.gradients())
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        largest = gradient.abs().max().item()
        assert (found[1][name] - gradient).abs().max().item() <= 1e-5 * largest, name


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("contrastive", {"temperature": 0.0}, "temperature=0.0, expected above 0"),
        ("contrastive", {"window": 0}, "window=0, expected at least 1"),
        ("reconstruct", {"width": 20, "heads": 8}, "width=20, expected an even number that divid"),
        ("diversity", {"std": 2.0}, r"std=2.0, expected in \(0, 1\]"),
        ("diversity", {"covariance": -1.0}, "covariance=-1.0, expected at least 0"),
        ("window", {"before": -1}, "before=-1, behind=8, expected at least 0"),
        ("gist", {"mask": 1.0}, r"mask=1.0, expected in \[0, 1\)"),
        ("gist", {"width": 10, "heads": 4}, "width=10 does not divide among heads=4"),
    ],
)
def test_settings_are_checked(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(kind, **settings)


@pytest.mark.parametrize(
    "kind", ["contrastive", "reconstruct", "gist", "diversity", "semantic_anchor"]
)
def test_what_needs_the_encoder_is_refused_on_a_base(kind: str, llama_folder: Path) -> None:
    stage = StageConfig("s", steps=1, objectives=(objective(kind), objective("answer")))
    config = tiny_config(llama_folder, stages=(stage,))
    with pytest.raises(ConfigError, match=f"objective '{kind}' trains latents, and the encoder"):
        replace(config, base="runs/a")


@pytest.mark.parametrize("optim", [{"batch_size": 1}, {"micro_batch": 1}])
def test_texts_are_compared_with_others(llama_folder: Path, optim: dict[str, int]) -> None:
    def config(*kinds: ObjectiveConfig) -> RunConfig:
        stage = StageConfig("s", steps=1, objectives=(*kinds, objective("answer")))
        return changed(tiny_config(llama_folder), optim=optim, stages=(stage,))

    with pytest.raises(ConfigError, match="'s': contrastive and diversity compares the texts"):
        config(objective("contrastive"), objective("diversity"))
    config(objective("diversity", form="slots"))


def test_stages_share_a_head(llama_folder: Path) -> None:
    stages = tuple(
        StageConfig(f"s{width}", steps=1, objectives=(objective("contrastive", width=width),))
        for width in (16, 32)
    )
    with pytest.raises(ConfigError, match="'contrastive' has one head for all of them; give it th"):
        tiny_config(llama_folder, stages=stages)


def test_the_window_needs_positions(llama_folder: Path) -> None:
    stage = StageConfig("s", steps=1, objectives=(objective("window"),))
    with pytest.raises(ConfigError, match="objective 'window' needs encoder pooler 'selected'"):
        tiny_config(llama_folder, stages=(stage,))
