"""Latents at selected positions: what is chosen, what of a reader is matched, what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import TestbedStream
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.selected import best_places
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.objectives.prepared import total_counts
from latentwire_fast.objectives.token_alignment import move_attention, move_places
from latentwire_fast.prompts.builder import Prompt, Turn, context_text, full_text
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.readers.trace import observe
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.builders import build_model
from runs import deep, soft, tiny_config

MATCH = StageConfig("match", steps=1, objectives=weighted(select=1.0, kv=1.0))
SELECTED = {"latents": 5, "d_z": 8, "pooler": POOLERS.config("selected"), "frozen": True}
DEEP = (deep(width=16, heads=2, expansion=1),)


# --- which positions ----------------------------------------------------------------------------


def test_best_places_are_the_highest_scores_in_order() -> None:
    scores = torch.tensor([[0.1, 3.0, -torch.inf, 2.0, 0.5], [5.0, 1.0, 2.0, 3.0, 4.0]])
    assert best_places(scores, 3).tolist() == [[1, 3, 4], [0, 3, 4]]


def test_a_text_with_fewer_positions_repeats_its_last() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf], [1.0, 4.0, 3.0, 2.0]])
    assert best_places(scores, 6).tolist() == [[1, 2, 2, 2, 2, 2], [0, 1, 2, 3, 3, 3]]


@pytest.fixture(params=["llama", "qwen"])
def encoder(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> LMEncoder:
    reader = readers[request.param]
    torch.manual_seed(1)
    config = ENCODERS.config("lm", source=reader.source, **SELECTED)
    built = build_encoder(config, {reader.name: reader}).eval()
    assert isinstance(built, LMEncoder)
    return built


@torch.no_grad()
@pytest.mark.parametrize("pure", [False, True], ids=["context", "pure"])
def test_positions_are_of_the_text_and_no_others(
    encoder: LMEncoder, examples: list[Example], pure: bool
) -> None:
    contexts = [e.context for e in examples[:4]]
    questions = [e.question for e in examples[:4]] if pure else None
    latent, selection = encoder.select(contexts, questions)
    assert torch.equal(latent, encoder(contexts, questions))
    label = len(encoder.prompts.text_ids("Context:"))
    for i, (scores, places) in enumerate(
        zip(selection.scores_BT, selection.places_BM, strict=True)
    ):
        ends = encoder.text_ends(contexts[i], questions[i] if questions else None)
        open_ = [t for t, score in enumerate(scores.tolist()) if score > -torch.inf]
        assert open_ == list(range(label, len(ends)))
        wanted = scores.topk(5).indices.sort().values
        assert torch.equal(places, wanted)


@torch.no_grad()
def test_an_empty_context_has_a_latent(encoder: LMEncoder) -> None:
    latent = encoder(["", "Nulnak has lived in Borgen for many years."])
    assert latent.isfinite().all()
    assert latent.shape == (2, 5, 8)


def test_other_poolers_select_nothing(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    encoder = build_encoder(ENCODERS.config("lm", source=reader.source), {reader.name: reader})
    assert isinstance(encoder, LMEncoder)
    with pytest.raises(ConfigError, match="pooler 'queries' selects no positions"):
        encoder.select(["text"])


# --- what a reader does with a text -------------------------------------------------------------


@pytest.fixture
def prompts(reader: Reader, examples: list[Example]) -> list[Prompt]:
    """Ragged text prompts with two questions and their answers."""
    found = []
    for e, other in zip(examples[:3], examples[3:6], strict=True):
        turns = [Turn(e.question, e.answers[0]), Turn(other.question, other.answers[0])]
        found.append(reader.prompts.build(turns, context=e.context))
    return found


@pytest.fixture(params=["llama", "qwen"])
def reader(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Reader:
    return readers[request.param]


@torch.no_grad()
def test_attention_is_what_eager_attention_reports(reader: Reader, prompts: list[Prompt]) -> None:
    before = reader.model.config._attn_implementation
    seen = observe(reader, prompts)
    assert reader.model.config._attn_implementation == before
    for row, prompt in enumerate(prompts):
        asking = [i - 1 for i, target in enumerate(prompt.is_target) if target]
        reader.model.set_attn_implementation("eager")
        try:
            attentions = reader.backbone(
                input_ids=torch.tensor([prompt.ids]), output_attentions=True, use_cache=False
            ).attentions
        finally:
            reader.model.set_attn_implementation(before)
        expected = sum(layer[0, :, asking].sum((0, 1)) for layer in attentions)
        found = seen.attention_BT[row]
        torch.testing.assert_close(found[: len(prompt.ids)], expected, rtol=1e-4, atol=1e-5)
        assert not found[len(prompt.ids) :].any(), "nothing looks at padding"


@torch.no_grad()
def test_keys_are_those_of_the_slot_and_values_those_of_the_place(
    reader: Reader, prompts: list[Prompt]
) -> None:
    """In the first layer, a key depends on its token and position alone: the token read at the
    slot's position has the key that the slot is to hold."""
    places = torch.tensor([[3, 4, 9], [5, 11, 12], [0, 1, 2]])
    found = observe(reader, prompts).keys_values(places)
    geometry = reader.kv_geometry
    assert found.shape == (geometry.layers, 2, 3, geometry.heads, 3, geometry.head_width)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        whole = reader.backbone(input_ids=ids, use_cache=True).past_key_values
        short = reader.backbone(input_ids=ids[:, places[row]], use_cache=True).past_key_values
        for layer in range(geometry.layers):
            values = whole.layers[layer].values[0][:, places[row]]
            torch.testing.assert_close(found[layer, 1, row], values, rtol=1e-4, atol=1e-4)
        keys = short.layers[0].keys[0]
        torch.testing.assert_close(found[0, 0, row], keys, rtol=1e-4, atol=1e-4)


def test_places_go_to_the_token_with_the_same_last_character() -> None:
    own, others = [3, 5, 9, 12], [2, 5, 6, 12, 14]
    moved = move_places(torch.tensor([[0, 1, 2, 3]]), [(own, others)])
    assert moved.tolist() == [[1, 1, 3, 3]]


def test_attention_goes_along_and_that_to_the_question_is_left_out() -> None:
    own, others = [3, 5, 9, 12], [2, 5, 6, 12, 14, 16]
    attention_BT = torch.tensor([[1.0, 2.0, 4.0, 8.0, 100.0, 100.0, 100.0]])
    scores = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    shares = move_attention(attention_BT, [(own, others)], scores)
    torch.testing.assert_close(shares, torch.tensor([[1.0, 2.0, 4.0, 0.0]]) / 7)


def test_both_tokenizers_find_the_same_words(
    readers: dict[str, Reader], examples: list[Example]
) -> None:
    """The last token of an answer in one tokenisation is its last token in the other."""
    llama, qwen = readers["llama"].prompts, readers["qwen"].prompts
    for example in examples[:20]:
        text = context_text(example.context)
        stop = text.index(example.answers[0]) + len(example.answers[0])
        ends = llama.text_ends(text), qwen.text_ends(full_text(example.context, example.question))
        place = ends[0].index(stop)
        moved = move_places(torch.tensor([[place]]), [ends]).item()
        assert ends[1][int(moved)] == stop


# --- learning -----------------------------------------------------------------------------------


@pytest.fixture(params=["context", "pure"])
def setting(
    request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path
) -> tuple[Interlingua, ObjectiveSet, list[Any]]:
    config = tiny_config(
        *(llama_folder, qwen_folder),
        mode=request.param,
        attachments=DEEP,
        encoder=SELECTED,
        stages=(MATCH,),
    )
    readers = load_readers(config.readers)
    torch.manual_seed(3)
    model = build_model(config, readers)
    items = TestbedStream(config.data, mode=config.mode, seed=7).batch(0, 5, facts=2)
    return model, ObjectiveSet(model, readers), items


def losses(objectives: ObjectiveSet, items: Sequence[Any], stage: StageConfig = MATCH) -> Any:
    prepared = objectives.prepare(items, stage, sorted(objectives.readers))
    return objectives.compute(prepared, stage, total_counts(prepared))


def test_matching_counts_texts_and_cutting_a_batch_changes_nothing(setting: Any) -> None:
    _, objectives, items = setting
    prepared = objectives.prepare(items, MATCH, sorted(objectives.readers))
    counts = total_counts(prepared)
    assert set(counts.values()) == {5}
    whole = objectives.compute(prepared, MATCH, counts).total.item()
    parts = sum(objectives.compute(prepared[i : i + 2], MATCH, counts).total for i in (0, 2, 4))
    assert parts.item() == pytest.approx(whole, rel=1e-5)


def test_matching_is_the_squared_error_to_the_readers_own(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix that is c times what the reader holds is off by (1 - c) times its mean square."""
    model, objectives, items = setting
    contexts = [item.context for item in items]
    pure = [item.turns[0].question for item in items] if model.mode == "pure" else None
    _, selection = model.select(contexts, pure)
    for name, reader in objectives.readers.items():
        start = reader.prompts.content_start
        rows = []
        for item in items:
            question = item.turns[0].question
            own = model.encoder.text_ends(item.context, question if pure else None)
            rows.append((own, reader.prompts.text_ends(full_text(item.context, question))))
        texts = [reader.prompts.build(item.turns, context=item.context) for item in items]
        places = start + move_places(selection.places_BM, rows)
        target = observe(reader, texts).keys_values(places)
        monkeypatch.setattr(model, "deep_prefix", lambda *_, half=0.5 * target, **__: half)
        rms = torch.tensor(model.cards[name].kv.rms)
        wanted = (0.25 * target.pow(2).mean((2, 3, 4, 5)) / rms.pow(2)).mean().item() * len(items)
        prepared = objectives.prepare(items, MATCH, [name])
        found = objectives.compute(prepared, MATCH, total_counts(prepared)).sums["kv", name].item()
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_few_steps_match_better_and_leave_the_frozen_core_alone(setting: Any) -> None:
    model, objectives, items = setting
    before = {n: p.clone() for n, p in model.encoder.core.named_parameters()}
    optimizer = torch.optim.Adam([p for _, p in model.trained_parameters()], lr=3e-3)
    first: dict[Any, Tensor] = losses(objectives, items).sums
    for _ in range(30):
        optimizer.zero_grad()
        losses(objectives, items).total.backward()
        optimizer.step()
    last = losses(objectives, items).sums
    assert all(last[key] < first[key] for key in first)
    assert all(torch.equal(before[n], p) for n, p in model.encoder.core.named_parameters())


def test_matching_under_bf16_autocast_is_close(setting: Any) -> None:
    _, objectives, items = setting
    exact = losses(objectives, items).sums
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(objectives, items)
    rounded.total.backward()
    for key, value in exact.items():
        assert rounded.sums[key].item() == pytest.approx(value.item(), rel=0.05)


def test_keys_and_values_alone_need_no_answers(setting: Any) -> None:
    """The same error whether the answers are read behind the text or not."""
    _, objectives, items = setting
    both = losses(objectives, items).sums
    alone = losses(objectives, items, replace(MATCH, objectives=weighted(kv=1.0))).sums
    assert {objective for objective, _ in alone} == {"kv"}
    for key, value in alone.items():
        assert value.item() == pytest.approx(both[key].item(), rel=1e-5)


def test_scores_alone_can_be_trained(setting: Any) -> None:
    _, objectives, items = setting
    found = losses(objectives, items, replace(MATCH, objectives=weighted(select=1.0)))
    assert {objective for objective, _ in found.sums} == {"select"}
    found.total.backward()


@torch.no_grad()
def test_a_saved_model_selects_the_same(setting: Any, tmp_path: Path) -> None:
    model, _, items = setting
    contexts = [item.context for item in items]
    questions = [item.turns[0].question for item in items] if model.mode == "pure" else None
    model.save_pretrained(tmp_path / "model")
    loaded = Interlingua.from_pretrained(tmp_path / "model")
    expected = model.eval().encode(contexts, questions)
    assert torch.equal(loaded.encode(contexts, questions), expected)


# --- configurations that cannot be --------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "attachments", "stage", "message"),
    [
        (SELECTED, DEEP, {"answer": 1.0}, "need each other"),
        (SELECTED, DEEP, {"answer": 1.0, "select": 0.0}, "need each other"),
        ({}, DEEP, {"select": 1.0}, "need each other"),
        (ENCODERS.config("byte"), (soft(),), {"select": 1.0}, "need each other"),
        (SELECTED, (soft(),), {"select": 1.0, "kv": 1.0}, "attachment 'deep'"),
        ({}, DEEP, {"kv": 1.0}, "pooler 'selected'"),
    ],
)
def test_selection_and_its_stages_go_together(
    llama_folder: Path,
    qwen_folder: Path,
    encoder: Any,
    attachments: Any,
    stage: dict[str, float],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(
            *(llama_folder, qwen_folder),
            encoder=encoder,
            attachments=attachments,
            stages=(StageConfig("a", steps=1, objectives=weighted(**stage)),),
        )


@pytest.mark.parametrize("part", ["all", "encoder", "encoder.pooler"])
def test_positions_that_another_run_has_learned_need_no_stage(
    llama_folder: Path, qwen_folder: Path, part: str
) -> None:
    stage = StageConfig("a", steps=1, objectives=weighted(answer=1.0))
    options: dict[str, Any] = {"encoder": SELECTED, "attachments": DEEP, "stages": (stage,)}
    tiny_config(llama_folder, qwen_folder, **options, warm_start={part: "runs/a"})
    with pytest.raises(ConfigError, match=r"begin as in a run .*warm_start"):
        tiny_config(
            llama_folder, qwen_folder, **options, warm_start={"attachments.llama": "runs/a"}
        )
