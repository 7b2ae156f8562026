"""Ragged prompts and prefixes in one padded batch, against rows that spell out every position."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.batch import PaddingSide, PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt

VOCAB, WIDTH, PAD = 30, 4, 29


class Position(NamedTuple):
    """What one real position of a row must hold."""

    embedding: Tensor
    token: int  # PAD inside a prefix
    is_prefix: bool
    is_target: bool


def table() -> nn.Embedding:
    embedding = nn.Embedding(VOCAB, WIDTH)
    nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(0))
    return embedding.requires_grad_(False)


def spell_out(prompt: Prompt, prefix: Tensor, embedding: nn.Embedding) -> list[Position]:
    """A row's real positions in order."""
    row = [
        Position(embedding.weight[token], token, False, is_target)
        for token, is_target in zip(prompt.ids, prompt.is_target, strict=True)
    ]
    at = prompt.latent_at or 0
    row[at:at] = [Position(vector, PAD, True, False) for vector in prefix]
    return row


@st.composite
def ragged(draw: st.DrawFn, *, latent: bool) -> tuple[list[Prompt], list[Tensor]]:
    """Up to five prompts, each with several answers, and prefixes of 0 to 4 positions."""
    prompts, prefixes = [], []
    for _ in range(draw(st.integers(1, 5))):
        prompt = Prompt()
        for _ in range(draw(st.integers(1, 3))):
            prompt.add(draw(st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=4)))
            prompt.add(draw(st.lists(st.integers(0, VOCAB - 2), max_size=3)), target=True)
        size = 0
        if latent:
            size = draw(st.integers(0, 4))
            prompt.latent_at = draw(st.integers(0, len(prompt.ids)))
        prompts.append(prompt)
        prefixes.append(100.0 + torch.arange(size * WIDTH).view(size, WIDTH).float())
    return prompts, prefixes


def check_rows(batch: PromptBatch, rows: list[list[Position]], *, has_prefix: bool) -> None:
    """Every tensor of a batch against the spelled-out rows."""
    width = max(map(len, rows))
    starts = [width - len(row) if batch.side == "left" else 0 for row in rows]
    scored, places = [], []
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        real = slice(start, start + len(row))
        mask = torch.zeros(width, dtype=torch.bool)
        mask[real] = True
        assert torch.equal(batch.mask_BT[b], mask)
        assert batch.ids_BT[b, real].tolist() == [p.token for p in row]
        assert (batch.ids_BT[b, ~mask] == PAD).all()
        assert batch.positions_BT[b, real].tolist() == list(range(len(row)))
        if batch.embeds_BTD is not None:
            assert torch.equal(batch.embeds_BTD[b, real], torch.stack([p.embedding for p in row]))
        step = 0
        for i, position in enumerate(row):
            if position.is_prefix:
                places.append([b, start + i])
            if position.is_target:
                # Predicted at the position before it, which sees nothing of it.
                scored.append([b, start + i - 1, position.token, step])
            # A prefix in the middle of an answer does not begin a new one.
            step = step + 1 if position.is_target else (step if position.is_prefix else 0)
    columns = [batch.rows_N, batch.cols_N, batch.labels_N, batch.step_N]
    assert torch.stack(columns, 1).tolist() == scored
    assert batch.places_P2.tolist() == places
    assert batch.lengths_B.tolist() == [len(row) for row in rows]
    assert (batch.embeds_BTD is not None) == has_prefix


@settings(max_examples=60)
@given(case=ragged(latent=True), side=st.sampled_from(["left", "right"]))
def test_every_position_of_ragged_prefixes(
    case: tuple[list[Prompt], list[Tensor]], side: PaddingSide
) -> None:
    prompts, prefixes = case
    embedding = table()
    batch = collate(prompts, embedding=embedding, pad_id=PAD, prefixes=prefixes, side=side)
    rows = [spell_out(p, m, embedding) for p, m in zip(prompts, prefixes, strict=True)]
    check_rows(batch, rows, has_prefix=True)


@settings(max_examples=30)
@given(case=ragged(latent=False), side=st.sampled_from(["left", "right"]))
def test_every_position_of_text(case: tuple[list[Prompt], list[Tensor]], side: PaddingSide) -> None:
    prompts, prefixes = case
    embedding = table()
    batch = collate(prompts, embedding=embedding, pad_id=PAD, side=side)
    rows = [spell_out(p, m, embedding) for p, m in zip(prompts, prefixes, strict=True)]
    check_rows(batch, rows, has_prefix=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_right_after_the_prefix_is_predicted_at_its_last_position(
    side: PaddingSide,
) -> None:
    """S000 fed `gold[:, :t+1]` and scored `gold[:, t]`; here position t sees `gold[:, :t]`."""
    prompt = Prompt(ids=[5, 11, 12, 13], latent_at=1, is_target=[False, True, True, True])
    longer = Prompt(ids=[1, 2, 3, 4, 5, 6, 7], latent_at=0, is_target=[False] * 7)
    batch = collate(
        [prompt, longer],
        embedding=table(),
        pad_id=PAD,
        prefixes=torch.ones(2, 3, WIDTH),
        side=side,
    )
    start = 3 if side == "left" else 0  # rows of 7 and 10 positions
    assert batch.cols_N.tolist() == [start + 3, start + 4, start + 5]
    assert batch.cols_N[0].item() == batch.places_P2[2, 1].item()
    assert batch.labels_N.tolist() == [11, 12, 13]
    assert batch.step_N.tolist() == [0, 1, 2]
    assert batch.rows_N.tolist() == [0, 0, 0]


def test_a_tensor_of_prefixes_is_a_list_of_equal_ones() -> None:
    prompts = [Prompt([1, 2], 1, [False, True]), Prompt([3, 4, 5], 2, [False, False, True])]
    prefixes = torch.randn(2, 3, WIDTH)
    batches = [
        collate(prompts, embedding=table(), pad_id=PAD, prefixes=given)
        for given in (prefixes, [*prefixes])
    ]
    assert batches[0].embeds_BTD is not None
    assert batches[1].embeds_BTD is not None
    assert torch.equal(batches[0].embeds_BTD, batches[1].embeds_BTD)
    assert torch.equal(batches[0].places_P2, batches[1].places_P2)


def test_gradients_reach_every_prefix_position_once() -> None:
    prompts = [Prompt([1, 2], 1, [False, True]), Prompt([3, 4, 5], 0, [False, False, True])]
    prefixes = [
        torch.randn(2, WIDTH, requires_grad=True),
        torch.randn(4, WIDTH, requires_grad=True),
    ]
    batch = collate(prompts, embedding=table(), pad_id=PAD, prefixes=prefixes, side="left")
    assert batch.embeds_BTD is not None
    batch.embeds_BTD.sum().backward()
    for prefix in prefixes:
        assert torch.equal(prefix.grad, torch.ones_like(prefix))


def test_right_padding_needs_no_mask_and_left_padding_has_one() -> None:
    prompts = [Prompt([1, 2], None, [False, True]), Prompt([3, 4, 5], None, [False, False, True])]
    right = collate(prompts, embedding=table(), pad_id=PAD).model_inputs()
    assert right["attention_mask"] is None
    left = collate(prompts, embedding=table(), pad_id=PAD, side="left").model_inputs()
    assert left["attention_mask"] is not None
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert set(left) == {"input_ids", "attention_mask", "position_ids"}


def test_a_prefix_replaces_token_ids_in_the_models_inputs() -> None:
    batch = collate(
        [Prompt([1], 1, [False])], embedding=table(), pad_id=PAD, prefixes=torch.ones(1, 2, WIDTH)
    )
    assert set(batch.model_inputs()) == {"inputs_embeds", "attention_mask", "position_ids"}


@pytest.mark.parametrize("latent_at", [None, 0])
def test_prompts_and_prefixes_must_belong_together(latent_at: int | None) -> None:
    prefixes = torch.ones(1, 2, WIDTH) if latent_at is None else None
    with pytest.raises(ConfigError, match="prefixes and prompts do not match"):
        collate([Prompt([1], latent_at, [False])], embedding=table(), pad_id=PAD, prefixes=prefixes)
