"""A number of latents that goes by the text's length: encoders, payloads, prefixes, receivers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.models.joined import joined_inputs
from latentwire_fast.prompts.builder import context_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.wire import read_header
from varying import LATENTS, POOLED, TEXTS, TOKENS, encoder_of, model_of


def test_as_many_latents_as_tokens_ask_for(reader: Reader) -> None:
    encoder = encoder_of(reader)
    label = len(reader.prompts.label_ids)
    sizes = [len(reader.prompts.text_ids(context_text(text))) - label for text in TEXTS]
    wanted = tuple(max(2, min(LATENTS, -(-size // TOKENS))) for size in sizes)
    assert encoder.latent_counts(TEXTS) == wanted
    assert len({*wanted}) == 3
    assert encoder_of(reader, tokens_per_latent=None, least_latents=1).latent_counts(TEXTS) is None
    assert encoder_of(reader, tokens_per_latent=0.5).latent_counts(TEXTS) == (LATENTS,) * 3


@torch.no_grad()
@pytest.mark.parametrize("pooler", POOLED)
def test_a_text_has_the_same_latents_alone_and_in_a_batch(reader: Reader, pooler: str) -> None:
    encoder = encoder_of(reader, pooler)
    counts = encoder.latent_counts(TEXTS)
    assert counts is not None
    together = encoder(TEXTS)
    assert together.isfinite().all()
    alone = torch.cat([encoder([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for latent, count in zip(together, counts, strict=True):
        assert (latent[:count].square().mean(-1) > 0.9).all()
        assert not latent[count:].any()
    # All six of a long text are those of an encoder whose number does not vary.
    fixed = encoder_of(reader, pooler, tokens_per_latent=None, least_latents=1)
    fixed.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(together[1:2], fixed(TEXTS[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pooler", ["spans", "convolution"])
def test_fewer_spans_are_those_of_an_encoder_with_fewer(reader: Reader, pooler: str) -> None:
    encoder = encoder_of(reader, pooler)
    counts = encoder.latent_counts(TEXTS)
    assert counts is not None
    fewer = encoder_of(reader, pooler, tokens_per_latent=None, latents=counts[2], least_latents=1)
    fewer.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(TEXTS)[2, : counts[2]], fewer(TEXTS[2:])[0])


def test_payloads_carry_their_own_number(reader: Reader) -> None:
    model = model_of(reader)
    payloads = model.encode_payloads(TEXTS)
    counts = model.encoder.latent_counts(TEXTS)
    assert tuple(read_header(payload).latents for payload in payloads) == counts
    assert len({*map(len, payloads)}) == 3
    decoded = model.decode_payloads(payloads)
    torch.testing.assert_close(decoded, model.quantize(model.encode(TEXTS)))
    for payload, latent in zip(payloads, decoded, strict=True):
        assert torch.equal(model.decode_payloads([payload])[0], latent)
    with pytest.raises(ConfigError, match=r"slots=model.encoder.latent_counts"):
        model.payloads(model.encode(TEXTS))
    other = model_of(reader, tokens_per_latent=None, least_latents=1)
    with pytest.raises(PayloadError, match="latents"):
        other.decode_payloads(payloads[:1])


@torch.no_grad()
def test_prefixes_in_a_batch_are_those_of_a_latent_alone(reader: Reader) -> None:
    model = model_of(reader)
    chunks, latent = model.cut(TEXTS), model.encode(TEXTS)
    assert chunks.pieces.slots is not None
    absent = chunks.pieces.absent_RM(LATENTS, device=latent.device)
    given = model.reader_inputs(reader.name, latent, absent_BM=absent)
    inputs = joined_inputs(given, chunks.pieces, reader=reader)
    for row, count in enumerate(chunks.pieces.slots):
        alone = model.reader_inputs(reader.name, latent[row : row + 1, :count])
        torch.testing.assert_close(inputs["prefixes"][row], alone["prefixes"][0])
        assert alone["deep"] is not None
        torch.testing.assert_close(
            inputs["deep"][:, :, row, :, LATENTS - count :], alone["deep"][:, :, 0]
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tokens_per_latent": 0.0}, "tokens_per_latent=0.0"),
        ({"least_latents": LATENTS + 1}, "least_latents=7, expected at most"),
        ({"least_latents": 0}, "least_latents=0"),
        ({"tokens_per_latent": None}, "least_latents=2 is of encoders with tokens_per_latent"),
    ],
)
def test_settings_that_cannot_be(reader: Reader, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        encoder_of(reader, **options)


def test_more_tokens_never_get_fewer_latents(reader: Reader) -> None:
    encoder = encoder_of(reader, least_latents=1)
    counts = encoder.latent_counts(["word " * size for size in range(1, 40)])
    assert counts is not None
    assert all(a <= b for a, b in pairwise(counts))
