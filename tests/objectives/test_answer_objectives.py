"""Objectives over the answers' tokens against plain formulas on whole logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.config.schema import StageConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.objectives.entropy import entropy, predictions
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.readers.reader import Reader
from latentwire_fast.training.builders import absolute_paths
from runs import deep, soft, tiny_config
from stage_batches import StageBatch, assert_cut_alike, objective


@pytest.fixture(scope="module", params=["context", "pure"])
def batch(request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path) -> StageBatch:
    parts = (soft("linear"),)
    return StageBatch.of(llama_folder, qwen_folder, mode=request.param, attachments=parts)


def answer_logits(batch: StageBatch, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and places in the answer of every token behind the latents."""
    answers = batch.reader_batch(name, objective("answer")).answers
    logits_NV = batch.readers[name].output_head.logits(answers.hidden_ND)
    return logits_NV, answers.batch.labels_N, answers.batch.step_N


@torch.no_grad()
def test_label_smoothing_is_the_naive_one(batch: StageBatch) -> None:
    losses = batch.compute(objective("answer", tokens=2, label_smoothing=0.1))[0]
    for name in batch.readers:
        logits_NV, labels_N, step_N = answer_logits(batch, name)
        kept_N = step_N < 2
        expected = F.cross_entropy(
            logits_NV[kept_N], labels_N[kept_N], label_smoothing=0.1, reduction="sum"
        )
        torch.testing.assert_close(losses.sums["answer", name], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("auto_scale", [0.0, 2.0])
def test_first_tokens_scale_themselves(batch: StageBatch, auto_scale: float) -> None:
    config = objective("first_token", auto_scale=auto_scale)
    losses = batch.compute(config)[0]
    for name in batch.readers:
        logits_NV, labels_N, step_N = answer_logits(batch, name)
        log_n = -F.cross_entropy(logits_NV, labels_N, reduction="none")[step_N == 0]
        weights_n = (1 - log_n.exp()) ** auto_scale
        expected = -(weights_n * log_n).sum()
        torch.testing.assert_close(losses.sums["first_token", name], expected, rtol=1e-4, atol=0)
        scale = losses.measures.get(("first_token_scale", name))
        assert (scale is None) == (auto_scale == 0)
        if scale is not None:
            assert scale.item() == pytest.approx(weights_n.mean().item(), rel=1e-4)
    assert_cut_alike(batch, config, objective("answer"))


def states(batch: StageBatch, name: str, kind: str, number: int) -> Tensor:
    """Hidden states of a layer at the answers' tokens, behind the latents or behind the text."""
    read = batch.reader_batch(name, objective("kd"))
    reader = batch.readers[name]
    given: Any = read.inputs if kind == "latent" else {}
    rows = reader.collate(read.prompts(kind), **given)
    output = reader._read(rows, output_hidden_states=True)
    states_BTD: Tensor = output.hidden_states[number]
    return states_BTD[rows.rows_N, rows.cols_N]


@pytest.mark.parametrize("form", ["mse", "cosine"])
def test_hidden_states_are_those_with_the_text(
    batch: StageBatch, form: str, tmp_path: Path
) -> None:
    config = objective("hidden_kd", layers=(1, -1), form=form, tokens=2)
    losses = batch.compute(config, objective("answer"))[0]
    for name in batch.readers:
        step_N = answer_logits(batch, name)[2]
        expected = 0.0
        for number in (1, 2):
            ours, theirs = (states(batch, name, kind, number) for kind in ("latent", "text"))
            ours, theirs = ours[step_N < 2], theirs[step_N < 2]
            if form == "mse":
                found = (ours - theirs).square().mean(1) / theirs.square().mean(1)
            else:
                found = 1 - F.cosine_similarity(ours, theirs, dim=1)
            expected += found.sum().item() / 2
        assert losses.sums["hidden_kd", name].item() == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for r in batch.readers.values() for p in r.model.parameters())
    assert_cut_alike(batch, config, objective("answer"))
    for _ in range(2):  # kept in fp16, and found again
        cache = TeacherCache(tmp_path)
        kept = batch.compute(config, teacher=cache)[0].sums
        for key, value in kept.items():
            assert value.item() == pytest.approx(losses.sums[key].item(), rel=5e-3)
    assert (cache.hits, cache.misses) == (len(batch.items) * len(batch.readers), 0)


def test_hidden_states_behind_a_deep_prefix(llama_folder: Path) -> None:
    """And with activations that are computed again, as large readers need it."""
    parts = (deep(width=16, heads=2), soft("linear"))
    config = objective("hidden_kd", layers=(0, 1, -1))
    found = []
    for again in (False, True):
        one = StageBatch.of(llama_folder, attachments=parts)
        if again:
            one.readers["llama"].enable_gradient_checkpointing()
        loss = one.compute(config, objective("answer"))[0].total.item()
        found.append((loss, one.gradients()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert any("deep" in name for name in found[0][1])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_text_is_read_once_for_all_that_distil(
    batch: StageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are the answers behind the latents."""
    passes: list[str] = []
    read = Reader._read

    def watched(reader: Reader, *arguments: Any, **options: Any) -> Any:
        passes.append(reader.name)
        return read(reader, *arguments, **options)

    monkeypatch.setattr(Reader, "_read", watched)
    alone = {kind: batch.compute(objective(kind))[0].sums for kind in ("kd", "hard_kd")}
    passes.clear()
    kinds = ("kd", "hard_kd", "hidden_kd", "answer", "first_token", "entropy")
    together = batch.compute(*map(objective, kinds))[0].sums
    assert sorted(passes) == sorted([*batch.readers] * 2)
    for sums in alone.values():
        for key, value in sums.items():
            torch.testing.assert_close(together[key], value)


def test_layers_that_a_reader_lacks_are_named(batch: StageBatch) -> None:
    with pytest.raises(ConfigError, match="reader 'llama' has 2 layers; give numbers from -3 to 2"):
        batch.compute(objective("hidden_kd", layers=(3,)))


def text_logits(batch: StageBatch, name: str, reader: Reader) -> Tensor:
    """Logits of the answers' tokens behind the text, of a reader of these prompts."""
    prompts = batch.reader_batch(name, objective("kd")).prompts("text")
    return reader.output_head.logits(reader.target_hidden(reader.collate(prompts)))


@pytest.mark.parametrize("own", [True, False])
def test_several_teachers_are_their_mean_probability(
    batch: StageBatch, own: bool, other_llama: Path
) -> None:
    """The gradient is that of the divergence to the mixture, the value larger by a constant."""
    config = objective(
        "teachers", teachers={"llama": (str(other_llama),)}, own=own, tau=2.0, tokens=2
    )
    name, reader = "llama", batch.readers["llama"]
    one = StageBatch(batch.model, {name: reader}, batch.items)
    found = one.compute(config)[0].sums["teachers", name].item()
    given = one.gradients()
    read = one.reader_batch(name, objective("answer"))
    kept_N = read.answers.batch.step_N < 2
    student = (reader.output_head.logits(read.answers.hidden_ND)[kept_N] / 2).log_softmax(-1)
    other = Reader.load(other_llama, name="other")
    teachers = [other, reader] if own else [other]
    with torch.no_grad():
        logs = [(text_logits(one, name, t)[kept_N] / 2).log_softmax(-1) for t in teachers]
        mixed = torch.stack(logs).exp().mean(0)
        apart = sum((log.exp() * (log - mixed.log())).sum() for log in logs) / len(logs)
    to_mixture = (mixed * (mixed.log() - student)).sum()
    assert found == pytest.approx(4 * (to_mixture + apart).item(), rel=1e-3)
    one.model.zero_grad(set_to_none=True)
    (4 * to_mixture / kept_N.sum()).backward()
    expected = one.gradients()
    assert given.keys() == expected.keys()
    for key, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert (given[key] - gradient).abs().max().item() <= 2e-3 * largest + 1e-9, key


def test_hard_answers_count_more(batch: StageBatch) -> None:
    config = objective("hard_kd", base=0.1, missed=2.0, entropy=0.5, tau=2.0, tokens=2)
    losses = batch.compute(config)[0]
    for name, reader in batch.readers.items():
        ours_NV, labels_N, step_N = answer_logits(batch, name)
        theirs_NV = text_logits(batch, name, reader)
        expected, factors, factor = 0.0, [], 0.0
        for ours, theirs, label, step in zip(ours_NV, theirs_NV, labels_N, step_N, strict=True):
            if step == 0:
                missed = 1 - ours.softmax(-1)[label].item()
                factor = 0.1 + 2.0 * missed + 0.5 * torch.special.entr(theirs.softmax(-1)).sum()
            if step < 2:
                pair = ((x / 2).log_softmax(-1) for x in (ours, theirs))
                kl = F.kl_div(*pair, reduction="sum", log_target=True).item()
                expected += 4 * kl * float(factor)
                factors.append(float(factor))
        assert losses.sums["hard_kd", name].item() == pytest.approx(expected, rel=1e-3)
        found = losses.measures["hard_factor", name].item()
        assert found == pytest.approx(sum(factors) / len(factors), rel=1e-4)
    assert_cut_alike(batch, config)


@pytest.mark.parametrize("form", ["batch", "answer"])
def test_entropy_of_first_tokens(batch: StageBatch, form: str) -> None:
    config = objective("entropy", form=form, least=6.0)
    losses = batch.compute(config)[0]
    found = batch.gradients()
    batch.model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for name in batch.readers:
        logits_NV, labels_N, step_N = answer_logits(batch, name)
        probs_AV = logits_NV[step_N == 0].softmax(-1)
        entropy_A = -(probs_AV * probs_AV.log()).sum(-1)
        if form == "answer":
            expected = (6.0 - entropy_A).clamp(min=0).mean()
        else:
            mean_V = probs_AV.mean(0)
            gold = F.one_hot(labels_N[step_N == 0], len(mean_V)).float().mean(0)
            together = -(mean_V * mean_V.log()).sum()
            expected = torch.special.entr(gold).sum() - (together - entropy_A.mean())
        count = len(probs_AV)
        assert losses.sums["entropy", name].item() == pytest.approx(
            count * expected.item(), rel=1e-3, abs=1e-5
        )
        total = total + expected
    assert total > 0
    total.backward()
    for key, gradient in batch.gradients().items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)
    if form == "answer":
        assert_cut_alike(batch, config)


def test_rows_that_are_no_tokens_have_no_gradient(batch: StageBatch) -> None:
    """A probability of exactly 0 makes no NaN."""
    reader = batch.readers["llama"]
    head = replace(reader.output_head, gaps=torch.tensor([3, 5]))
    hidden = torch.randn(4, reader.d_model, requires_grad=True)
    total, entropies = predictions(head, hidden)
    (entropy(total / 4) + entropies.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_reader_goes_on_from_its_own_tokens(batch: StageBatch) -> None:
    """With a share of 1: by hand, one prompt at a time."""
    config = objective("sampled", share=1.0, tokens=3)
    losses = batch.compute(config)[0]
    for name, reader in batch.readers.items():
        ours_NV, labels_N, step_N = answer_logits(batch, name)
        own = ours_NV.argmax(-1).tolist()
        read = batch.reader_batch(name, objective("answer"))
        expected, correct, n, changed = 0.0, 0, 0, 0
        for b, prompt in enumerate(read.prompts("latent")):
            ids, first = [*prompt.ids], n
            for i, is_target in enumerate(prompt.is_target):
                if is_target:
                    if ids[i] != reader.prompts.eos_id and own[n] not in reader.stop_ids:
                        ids[i] = own[n]
                        changed += own[n] != prompt.ids[i]
                    n += 1
            given: Any = {**read.inputs, "prefixes": read.inputs["prefixes"][b : b + 1]}
            rows = reader.collate([replace(prompt, ids=ids)], **given)
            logits = reader.output_head.logits(reader.target_hidden(rows))
            counts, labels = step_N[first:n] < 3, labels_N[first:n]
            expected += F.cross_entropy(logits[counts], labels[counts], reduction="sum").item()
            correct += int((logits.argmax(-1) == labels)[counts].sum())
        assert changed > 0
        assert losses.sums["sampled", name].item() == pytest.approx(expected, rel=1e-4)
        found = losses.measures["sampled_accuracy", name].item()
        assert found == pytest.approx(correct / int((step_N < 3).sum()))
    assert_cut_alike(batch, config)


def test_without_a_share_the_true_tokens_are_read(batch: StageBatch) -> None:
    config = objective("sampled", share=0.0)
    losses = batch.compute(config, objective("answer", weight=0.0))[0]
    for name in batch.readers:
        torch.testing.assert_close(losses.sums["sampled", name], losses.sums["answer", name])


def test_a_teacher_of_another_tokenizer_is_refused(batch: StageBatch, qwen_folder: Path) -> None:
    config = objective("teachers", teachers={"llama": (str(qwen_folder),)})
    with pytest.raises(ConfigError, match="has another tokenizer than reader 'llama'"):
        batch.compute(config)


def test_every_reader_has_a_teacher(llama_folder: Path, qwen_folder: Path) -> None:
    sources = {"llama": (str(llama_folder),)}
    for teachers, message in (
        ({"gemma": ("a",)}, r"teachers of \['gemma'\], this run has the readers"),
        (sources, r"readers \['qwen2'\] have no teacher; name one, or set own=true"),
    ):
        config = objective("teachers", teachers=teachers, own=False)
        stages = (StageConfig("s", steps=1, objectives=(config,)),)
        with pytest.raises(ConfigError, match=message):
            tiny_config(llama_folder, qwen_folder, stages=stages)


def test_a_teachers_path_is_absolute(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama_folder.parent)
    config = objective("teachers", teachers={"llama": (llama_folder.name,)})
    stage = StageConfig("s", steps=1, objectives=(config,))
    (found,) = absolute_paths(tiny_config(llama_folder, stages=(stage,))).stages
    assert found.objectives[0].teachers == {"llama": (str(llama_folder),)}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("answer", {"label_smoothing": 1.0}, r"label_smoothing=1.0, expected in \[0, 1\)"),
        ("first_token", {"auto_scale": -1.0}, "auto_scale=-1.0, expected at least 0"),
        ("hard_kd", {"missed": 0.0, "entropy": 0.0}, r"are \(0.0, 0.0, 0.0\), expected at least 0"),
        ("hard_kd", {"base": -1.0}, "expected at least 0, and one of them above"),
        ("entropy", {"least": 0.0}, "least=0.0, expected above 0"),
        ("sampled", {"share": 1.5}, r"share=1.5, expected in \[0, 1\]"),
        ("teachers", {}, "no teacher is named; give the sources of some by reader, or take"),
        ("teachers", {"teachers": {"a": ("b",)}, "tau": 0.0}, "tau=0.0, expected above 0"),
        ("hidden_kd", {"layers": ()}, r"layers=\(\), expected one number at least"),
        ("hidden_kd", {"layers": (1, 1)}, r"layers=\(1, 1\), expected one number"),
        ("hidden_kd", {"tokens": 0}, "tokens=0, expected at least 1"),
    ],
)
def test_settings_are_checked(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(kind, **settings)
