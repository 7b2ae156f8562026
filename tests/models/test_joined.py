"""Several latents in one prompt are read as one, whose prefix is as long as theirs together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.joined import Pieces, joined_inputs
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader
from receiving import D_Z, LATENTS, gpt2_reader, make_model

PREFIXES = ["soft", "deep", "both"]
COUNTS = (3, 1, 2)


def prompts_of(reader: Reader) -> list[Prompt]:
    questions = [("Where does Nulnak live?", "Bakrim"), ("What?", "94"), ("Who is it?", "a baker")]
    return [
        reader.prompts.build([Turn(question, answer)], context=None, latent="context")
        for question, answer in questions
    ]


def moved(model: Interlingua, reader: Reader, latent_Md: Tensor, start: int) -> Tensor:
    """The deep prefix of a latent, each key at `start` positions further on, one by one."""
    deep = model.deep_prefix(reader.name, latent_Md[None])
    assert deep is not None
    keys = [
        reader.turner.turn(part, layer=n, by_BT=torch.full((1, part.shape[2]), start))
        for n, part in enumerate(deep[:, 0])
    ]
    return torch.stack([torch.stack(keys), deep[:, 1]], 1)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_joined_prefixes_are_one_long_prefix(reader: Reader, prefix: str) -> None:
    """Scored with a prefix that was put together by hand, prompt by prompt."""
    model, prompts = make_model(reader, prefix), prompts_of(reader)
    latent_RMd = torch.randn(sum(COUNTS), LATENTS, D_Z)
    pieces = Pieces(COUNTS)
    inputs = joined_inputs(model.reader_inputs(reader.name, latent_RMd), pieces, reader=reader)
    together = reader.score(prompts, **inputs)
    for prompt, rows, gold in zip(
        prompts, pieces.rows, together.by_prompt(together.gold_N), strict=True
    ):
        soft = torch.cat([*model.prefix(reader.name, latent_RMd[rows.start : rows.stop])])
        deep = None
        if prefix != "soft":
            parts = [moved(model, reader, latent_RMd[r], i * LATENTS) for i, r in enumerate(rows)]
            deep = torch.cat(parts, 4)
        alone = reader.score([prompt], prefixes=[soft], deep=deep)
        torch.testing.assert_close(gold, alone.gold_N, rtol=1e-4, atol=1e-4)


def test_a_turned_key_stands_where_it_would_have_been_computed(reader: Reader) -> None:
    """The reader's own keys of a text's second half, computed at the text's start, and joined."""
    ids = torch.tensor([reader.prompts.text_ids("Nulnak lives in Bakrim. Fosvun has a red lamp.")])
    ids = ids[:, : ids.shape[1] // 2 * 2]
    half = ids.shape[1] // 2

    def first_layer(places: Tensor) -> Tensor:
        cache = DynamicCache()
        reader.backbone(
            input_ids=ids[:, : len(places)], position_ids=places[None], past_key_values=cache
        )
        return cache.layers[0].keys.detach()  # type: ignore[return-value]

    whole = first_layer(torch.arange(2 * half))
    apart = first_layer(torch.cat([torch.arange(half)] * 2))
    turned = reader.turner.turn(
        apart[:, :, half:], layer=0, by_BT=torch.full((1, half), half), last=2 * half
    )
    torch.testing.assert_close(turned, whole[:, :, half:], rtol=1e-4, atol=1e-4)


def test_vectors_that_a_latent_does_not_have_are_left_out(reader: Reader) -> None:
    model, prompts = make_model(reader, "both"), prompts_of(reader)[:2]
    latent = torch.randn(3, LATENTS, D_Z)
    pieces = Pieces((2, 1), slots=(4, 2, 3))
    given = model.reader_inputs(reader.name, latent)
    inputs = joined_inputs(given, pieces, reader=reader)
    assert [len(soft) for soft in inputs["prefixes"]] == [6, 3] == inputs["deep_lengths"]
    torch.testing.assert_close(
        inputs["prefixes"][0], torch.cat([given["prefixes"][0], given["prefixes"][1, :2]])
    )
    assert given["deep"] is not None
    values = given["deep"][:, 1]
    torch.testing.assert_close(inputs["deep"][:, 1, 1, :, 3:], values[:, 2, :, :3])
    both = reader.score(prompts, **inputs)
    alone = joined_inputs(
        model.reader_inputs(reader.name, latent[2:]), pieces.of([1]), reader=reader
    )
    single = reader.score(prompts[1:], **alone)
    torch.testing.assert_close(both.by_prompt(both.gold_N)[1], single.gold_N, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_latent(reader: Reader) -> None:
    model, prompts = make_model(reader, "both"), prompts_of(reader)
    latent = torch.randn(sum(COUNTS), LATENTS, D_Z, requires_grad=True)
    inputs = model.reader_inputs(reader.name, latent)
    scores = reader.score(prompts, **joined_inputs(inputs, Pieces(COUNTS), reader=reader))
    scores.gold_N.sum().backward()
    assert latent.grad is not None
    assert (latent.grad.abs().amax((1, 2)) > 0).all()


def test_one_whole_latent_each_changes_nothing(reader: Reader) -> None:
    inputs = make_model(reader, "both").reader_inputs(reader.name, torch.randn(3, LATENTS, D_Z))
    assert joined_inputs(inputs, Pieces.single(3), reader=reader) == {**inputs}


def test_keys_that_cannot_be_turned_are_refused(reader: Reader) -> None:
    other = gpt2_reader(reader, positions=128)
    model, latent = make_model(other, "deep"), torch.randn(2, LATENTS, D_Z)
    inputs = model.reader_inputs(other.name, latent)
    with pytest.raises(ConfigError, match="several payloads in one prompt"):
        joined_inputs(inputs, Pieces((2,)), reader=other)
    soft = make_model(other, "soft").reader_inputs(other.name, latent)
    assert len(joined_inputs(soft, Pieces((2,)), reader=other)["prefixes"][0]) == 2 * LATENTS
