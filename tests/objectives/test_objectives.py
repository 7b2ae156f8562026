"""Losses against plain formulas, one prompt at a time; and that cutting a batch changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.streams import TestbedStream, TrainItem
from latentwire_fast.models.interlingua import TASKS, Interlingua
from latentwire_fast.objectives.continuation import halves
from latentwire_fast.objectives.objective_set import Losses, ObjectiveSet
from latentwire_fast.objectives.prepared import Key, PreparedItem, total_counts
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.prompts.builder import Prompt, Turn, full_text
from latentwire_fast.readers.output_head import OutputHead
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import OBJECTIVES
from latentwire_fast.training.builders import build_model
from runs import soft, tiny_config

NAMES = ("llama", "qwen2")


def everything(limit: int | None = None) -> StageConfig:
    """A stage of all objectives that need no positions."""
    objectives = (
        OBJECTIVES.config("answer", tokens=limit),
        *weighted(autoencode=0.2, continuation=0.8, embed=0.3),
        OBJECTIVES.config("kd", weight=0.5, tau=2.0, tokens=limit),
    )
    return StageConfig("everything", steps=1, objectives=objectives)


EVERYTHING = everything()


def stage_of(**weights: float) -> StageConfig:
    """A stage of these objectives, their settings left at their defaults."""
    return StageConfig("+".join(weights), steps=1, objectives=weighted(**weights))


@dataclass
class Setting:
    """A fresh model, its readers, and a ragged batch of five items."""

    model: Interlingua
    readers: dict[str, Reader]
    items: list[TrainItem]

    @property
    def objectives(self) -> ObjectiveSet:
        return ObjectiveSet(self.model, self.readers)

    def prepare(self, stage: StageConfig) -> tuple[list[PreparedItem], Counter[Key]]:
        items = self.objectives.prepare(self.items, stage, NAMES)
        return items, total_counts(items)

    def compute(self, stage: StageConfig) -> Losses:
        items, counts = self.prepare(stage)
        return self.objectives.compute(items, stage, counts)

    def encode(self, item: TrainItem, *, half: bool = False) -> Tensor:
        """The latent of one item, encoded alone."""
        context = halves(item.context)[0] if half else item.context
        question = "" if half else item.turns[0].question
        return self.model.encode([context], [question] if self.model.mode == "pure" else None)


@pytest.fixture(scope="module", params=["context", "pure"])
def setting(request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path) -> Setting:
    config = tiny_config(
        llama_folder,
        qwen_folder,
        mode=request.param,
        attachments=(soft("linear"),),
        bottleneck={"bits": 6, "group_size": 16},
    )
    readers = load_readers(config.readers)
    torch.manual_seed(3)
    model = build_model(config, readers)
    stream = TestbedStream(config.data, mode=config.mode, seed=7)
    items = [item for facts in (1, 2, 4) for item in stream.batch(facts, 2, facts=facts)]
    return Setting(model, readers, items[:5])


# --- against formulas ---------------------------------------------------------------------------


def scored(
    reader: Reader, prompt: Prompt, prefix_MD: Tensor | None = None
) -> list[tuple[Tensor, int, int]]:
    """(logits, label, place in its answer from 0) of every target: one unpadded forward pass over
    embeddings laid out by hand, with the logits of position t - 1 predicting token t."""
    embeds_TD = reader.embedding(torch.tensor(prompt.ids))
    places = list(range(len(prompt.ids)))
    if prefix_MD is not None:
        at = prompt.latent_at
        assert at is not None
        embeds_TD = torch.cat([embeds_TD[:at], prefix_MD, embeds_TD[at:]])
        places = [i if i < at else i + len(prefix_MD) for i in places]
    logits_TV = reader.model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0].float()
    found, step = [], 0
    for i, place in enumerate(places):
        if prompt.is_target[i]:
            found.append((logits_TV[place - 1], prompt.ids[i], step))
        step = step + 1 if prompt.is_target[i] else 0
    return found


def cross_entropy(targets: list[tuple[Tensor, int, int]], limit: int | None = None) -> float:
    """Summed over the first `limit` tokens of each answer."""
    values = [
        -logits.log_softmax(-1)[label].item()
        for logits, label, step in targets
        if limit is None or step < limit
    ]
    return sum(values)


@pytest.mark.parametrize("limit", [None, 1, 2])
@torch.no_grad()
def test_answer_cross_entropy_is_the_naive_one(setting: Setting, limit: int | None) -> None:
    stage = StageConfig("answer", steps=1, objectives=(OBJECTIVES.config("answer", tokens=limit),))
    items, counts = setting.prepare(stage)
    losses = setting.compute(stage)
    total = 0.0
    for name, reader in setting.readers.items():
        expected, correct, tokens = 0.0, 0, 0
        for prepared in items:
            prefix = setting.model.prefix(name, setting.encode(prepared.item))[0]
            targets = scored(reader, prepared.prompts["latent", name], prefix)
            kept = [t for t in targets if limit is None or t[2] < limit]
            expected += cross_entropy(targets, limit)
            correct += sum(int(logits.argmax()) == label for logits, label, _ in kept)
            tokens += len(kept)
        assert counts["answer", name] == tokens
        assert losses.sums["answer", name].item() == pytest.approx(expected, rel=1e-4)
        assert losses.measures["accuracy", name].item() == pytest.approx(correct / tokens)
        total += expected / tokens
    assert set(losses.sums) == {("answer", name) for name in NAMES}
    assert losses.total.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("limit", [None, 1, 2, 50])
def test_k_token_counts(setting: Setting, limit: int | None) -> None:
    """An answer of n tokens and its EOS count min(K, n + 1) times, every turn anew."""
    objectives = tuple(OBJECTIVES.config(kind, tokens=limit) for kind in ("answer", "kd"))
    items, counts = setting.prepare(StageConfig("answer", steps=1, objectives=objectives))
    for name, reader in setting.readers.items():
        expected = 0
        for item in setting.items:
            for turn in item.turns:
                tokens = len(reader.prompts.answer_ids(turn.answer or "")) + 1
                expected += tokens if limit is None else min(limit, tokens)
        assert counts["answer", name] == counts["kd", name] == expected
    assert len(items) == len(setting.items)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("limit", [None, 2])
@torch.no_grad()
def test_kd_is_the_naive_kl_to_the_text_prompted_reader(
    setting: Setting, tau: float, limit: int | None
) -> None:
    objectives = (
        OBJECTIVES.config("answer", weight=0.0),
        OBJECTIVES.config("kd", weight=0.5, tau=tau, tokens=limit),
    )
    stage = StageConfig("kd", steps=1, objectives=objectives)
    items, counts = setting.prepare(stage)
    losses = setting.compute(stage)
    total = 0.0
    for name, reader in setting.readers.items():
        expected = 0.0
        for prepared in items:
            prefix = setting.model.prefix(name, setting.encode(prepared.item))[0]
            students = scored(reader, prepared.prompts["latent", name], prefix)
            text = reader.prompts.build(prepared.item.turns, context=prepared.item.context)
            teachers = scored(reader, text)
            for (student, label, step), (teacher, same, _) in zip(students, teachers, strict=True):
                assert label == same
                if limit is None or step < limit:
                    kl = F.kl_div(
                        (student / tau).log_softmax(-1),
                        (teacher / tau).log_softmax(-1),
                        reduction="sum",
                        log_target=True,
                    )
                    expected += tau**2 * kl.item()
        assert losses.sums["kd", name].item() == pytest.approx(expected, rel=1e-4)
        total += 0.5 * expected / counts["kd", name]
    assert losses.total.item() == pytest.approx(total, rel=1e-4), "CE is reported, not added"


def test_F20_answers_and_distillation_share_one_pass_over_the_head(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the losses and gradients that each has alone; what is only reported has no gradient."""
    calls: list[dict[str, Any]] = []
    scored_by = OutputHead.losses

    def watched(head: OutputHead, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return scored_by(head, *arguments, **options)

    monkeypatch.setattr(OutputHead, "losses", watched)
    parts = {
        "answer": OBJECTIVES.config("answer", weight=0.0, tokens=1),
        "kd": OBJECTIVES.config("kd", weight=0.5, tau=2.0, tokens=2),
    }
    both = gradients(setting, StageConfig("both", steps=1, objectives=tuple(parts.values())), 5)
    assert len(calls) == len(NAMES)
    assert [c["cross_entropy_gradient"] for c in calls] == [False] * len(NAMES)
    alone = gradients(setting, StageConfig("kd", steps=1, objectives=(parts["kd"],)), 5)
    assert both[0] == pytest.approx(alone[0], rel=1e-6)
    for name, gradient in alone[1].items():
        torch.testing.assert_close(both[1][name], gradient)
    calls.clear()
    trained = replace(parts["answer"], weight=1.0)
    setting.compute(StageConfig("both", steps=1, objectives=(parts["kd"], trained)))
    assert len(calls) == len(NAMES)


@torch.no_grad()
def test_rebuilding_is_the_naive_cross_entropy(setting: Setting) -> None:
    stage = stage_of(autoencode=0.2, continuation=0.8)
    items, counts = setting.prepare(stage)
    losses = setting.compute(stage)
    total = 0.0
    for name, reader in setting.readers.items():
        for objective, task, weight in (
            ("autoencode", "autoencode", 0.2),
            ("continuation", "continue", 0.8),
        ):
            expected = 0.0
            for prepared in items:
                latent = setting.encode(prepared.item, half=objective == "continuation")
                token = setting.model.task_tokens[name][TASKS.index(task)]
                prefix = torch.cat([setting.model.prefix(name, latent)[0], token[None]])
                expected += cross_entropy(scored(reader, prepared.prompts[objective, name], prefix))
            key = (objective, name)
            assert losses.sums[key].item() == pytest.approx(expected, rel=1e-4)
            total += weight * expected / counts[key]
    assert losses.total.item() == pytest.approx(total, rel=1e-4)
    assert set(losses.sums) == {(o, n) for o in ("autoencode", "continuation") for n in NAMES}
    assert losses.measures == {}


def test_embeddings_are_the_naive_squared_error(setting: Setting) -> None:
    """The first soft tokens against the reader's embeddings of the answer and its EOS; an answer
    longer than the latent is cut."""
    slots = setting.model.encoder_config.latents
    long = replace(setting.items[0], turns=(Turn("Who?", "one two three four five six"),))
    items = [long, *setting.items[1:]]
    stage = stage_of(embed=0.5)
    prepared = setting.objectives.prepare(items, stage, NAMES)
    counts = total_counts(prepared)
    losses = setting.objectives.compute(prepared, stage, counts)
    total = 0.0
    for name, reader in setting.readers.items():
        expected, tokens = 0.0, 0
        for item in items:
            answer = reader.prompts.answer_ids(item.turns[0].answer or "")
            ids = [*answer, reader.prompts.eos_id][:slots]
            prefix = setting.model.prefix(name, setting.encode(item))[0]
            for token, soft_D in zip(ids, prefix, strict=False):
                error_D = soft_D - reader.embedding.weight[token]
                expected += error_D.pow(2).mean().item() / reader.embedding_rms**2
            tokens += len(ids)
        assert tokens > len(items)
        assert len(prepared[0].prompts["answer", name].ids) == slots
        assert counts["embed", name] == tokens
        assert losses.sums["embed", name].item() == pytest.approx(expected, rel=1e-4)
        total += 0.5 * expected / tokens
    assert set(losses.sums) == {("embed", name) for name in NAMES}
    assert losses.total.item() == pytest.approx(total, rel=1e-4)
    assert losses.measures == {}
    losses.total.backward()
    assert all(p.grad is None for r in setting.readers.values() for p in r.model.parameters())
    for part in (setting.model.encoder, *setting.model.attachments.values()):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        part.zero_grad()


def test_rebuilding_targets(setting: Setting) -> None:
    """Autoencoding asks for what the latent encodes, continuation for what comes after its half."""
    items, counts = setting.prepare(EVERYTHING)
    for prepared in items:
        context, question = prepared.item.context, prepared.item.turns[0].question
        encoded = full_text(context, question) if setting.model.mode == "pure" else context
        first, second = halves(context)
        assert f"{first} {second}" == context
        assert abs(len(first.split()) - len(second.split())) <= 1
        for name, reader in setting.readers.items():
            builder = reader.prompts
            for objective, text in (("autoencode", encoded), ("continuation", second)):
                prompt = prepared.prompts[objective, name]
                targets = [i for i, t in zip(prompt.ids, prompt.is_target, strict=True) if t]
                assert targets == [*builder.text_ids(f" {text}"), builder.eos_id]
                assert prompt.latent_at is not None
                assert not any(prompt.is_target[: prompt.latent_at])
                assert prepared.counts[objective, name] == len(targets)
    assert set(counts) == {
        (o, n) for o in ("answer", "autoencode", "continuation", "embed", "kd") for n in NAMES
    }


@pytest.mark.parametrize("text", ["", "one", "one two", "one two three"])
def test_halves(text: str) -> None:
    first, second = halves(text)
    assert " ".join(part for part in (first, second) if part) == text
    assert bool(first) == bool(text)


@torch.no_grad()
def test_the_student_sees_the_context_through_the_latent_alone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the latent held fixed, the context makes no difference to the answer's loss."""
    shape = (len(setting.items), *setting.encode(setting.items[0]).shape[1:])
    latent = torch.randn(shape)
    monkeypatch.setattr(setting.model, "encode", lambda *_: latent)
    stage = stage_of(answer=1.0)
    expected = setting.compute(stage).sums
    others = [replace(item, context=f"Something else {i}.") for i, item in enumerate(setting.items)]
    found = Setting(setting.model, setting.readers, others).compute(stage).sums
    assert found == expected


def test_quantised_steps_train_on_what_the_receiver_gets(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    prefix = setting.model.prefix

    def watched(name: str, latent: Tensor, **options: Any) -> Tensor:
        seen.append(latent)
        return prefix(name, latent, **options)

    monkeypatch.setattr(setting.model, "prefix", watched)
    stage = replace(EVERYTHING, quantize=4)
    losses = setting.compute(stage)
    latent = losses.latent_BMd
    assert latent is not None
    assert not latent.requires_grad
    sent = setting.model.quantize(latent, 4)
    assert not torch.equal(sent, latent)
    assert len(seen) == 3 * len(NAMES), "answers and their embeddings, rebuilding, continuation"
    assert sum(torch.equal(value, sent) for value in seen) == 2 * len(NAMES)
    for value in seen:
        assert torch.equal(value, setting.model.quantize(value, 4)), "codes at 4 bits"
    setting.model.zero_grad()
    losses.total.backward()
    gradient = setting.model.encoder.project.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0, "straight through the codes"
    setting.model.zero_grad()


# --- batches ------------------------------------------------------------------------------------


def gradients(setting: Setting, stage: StageConfig, size: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the batch, `size` items at a time."""
    items, counts = setting.prepare(stage)
    setting.model.zero_grad()
    total = 0.0
    for start in range(0, len(items), size):
        losses = setting.objectives.compute(items[start : start + size], stage, counts)
        losses.total.backward()
        total += losses.total.item()
    found = {
        name: p.grad.clone() for name, p in setting.model.trained_parameters() if p.grad is not None
    }
    setting.model.zero_grad()
    return total, found


@pytest.mark.parametrize("limit", [None, 2])
def test_cutting_a_batch_changes_neither_loss_nor_gradient(
    setting: Setting, limit: int | None
) -> None:
    """All objectives at once, ragged in every respect, in micro-batches of 1, 2, 3 and all 5."""
    stage = everything(limit)
    whole, expected = gradients(setting, stage, 5)
    for size in (1, 2, 3):
        total, found = gradients(setting, stage, size)
        assert total == pytest.approx(whole, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            assert (found[name] - gradient).abs().max().item() <= 1e-4 * scale, name


def test_every_trained_parameter_gets_a_gradient_and_no_reader_does(setting: Setting) -> None:
    _, found = gradients(setting, EVERYTHING, 5)
    trained = dict(setting.model.trained_parameters())
    assert found.keys() == trained.keys()
    assert [name for name, gradient in found.items() if not gradient.abs().sum() > 0] == []
    for reader in setting.readers.values():
        assert all(p.grad is None for p in reader.model.parameters())


def test_only_active_readers_are_prepared_and_trained(setting: Setting) -> None:
    items = setting.objectives.prepare(setting.items, EVERYTHING, ["qwen2"])
    counts = total_counts(items)
    assert {name for _, name in counts} == {"qwen2"}
    setting.model.zero_grad()
    losses = setting.objectives.compute(items, EVERYTHING, counts)
    losses.total.backward()
    assert set(losses.measures) == {("accuracy", "qwen2")}
    adapters = setting.model.attachments
    assert all(p.grad is None for p in adapters["llama"].parameters())
    assert all(p.grad is not None for p in adapters["qwen2"].parameters())
    setting.model.zero_grad()


@torch.no_grad()
def test_kd_with_the_teacher_cache(setting: Setting, tmp_path: Path) -> None:
    """The states are kept in fp16: what is lost is what fp16 rounds away, the first time too."""
    stage = stage_of(answer=0.0, kd=1.0)
    exact = setting.compute(stage).sums
    results = []
    for _ in range(2):
        cache = TeacherCache(tmp_path)
        objectives = ObjectiveSet(setting.model, setting.readers, teacher=cache)
        items, counts = setting.prepare(stage)
        results.append(objectives.compute(items, stage, counts).sums)
    assert (cache.hits, cache.misses) == (len(setting.items) * len(NAMES), 0)
    assert results[0] == results[1]
    for name in NAMES:
        value = exact["kd", name].item()
        assert results[0]["kd", name].item() == pytest.approx(value, rel=5e-3)
        assert results[0]["answer", name] == exact["answer", name]


@pytest.mark.parametrize("backward", [False, True], ids=["sum", "sequential"])
def test_an_encoder_that_is_held_gets_no_gradient(setting: Setting, backward: bool) -> None:
    stage = replace(stage_of(answer=1.0, continuation=1.0), hold_encoder=True)
    setting.model.zero_grad(set_to_none=True)
    items, counts = setting.prepare(stage)
    step = Tensor.backward if backward else None
    losses = setting.objectives.compute(items, stage, counts, backward=step)
    if not backward:
        losses.total.backward()
    free = setting.compute(replace(stage, hold_encoder=False))
    torch.testing.assert_close(losses.total, free.total)
    got = {name for name, p in setting.model.named_parameters() if p.grad is not None}
    assert got
    assert not any(name.startswith("encoder.") for name in got)
    setting.model.zero_grad(set_to_none=True)
