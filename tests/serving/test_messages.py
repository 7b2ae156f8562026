"""Prompts about several payloads: in a batch each is what it is alone, and what transformers makes
of one prefix of the joined length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.joined import Pieces, joined_inputs
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions
from receiving import asking, at_most, gpt2_reader, make_model, random_payloads
from varying import TEXTS, model_of

NEW = 16
PREFIXES = ["soft", "deep", "both"]
QUESTIONS = ["Where does Nulnak live?", "What?", "What is the job of Selpon, if any?"]


@torch.no_grad()
def plain_path(
    model: Interlingua, reader: Reader, payloads: Sequence[bytes], prompt: Prompt
) -> tuple[Tensor, list[int]]:
    """First logits and greedy tokens of one prompt, by transformers alone."""
    given = model.reader_inputs(reader.name, model.decode_payloads(payloads))
    inputs = joined_inputs(given, Pieces((len(payloads),)), reader=reader)
    at = prompt.latent_at
    assert isinstance(at, int)
    embeds_TD = reader.embedding(torch.tensor(prompt.ids))
    embeds = torch.cat([embeds_TD[:at], inputs["prefixes"][0], embeds_TD[at:]])[None]
    cache = DynamicCache(config=reader.model.config)
    for number, (keys, values) in enumerate(() if inputs["deep"] is None else inputs["deep"]):
        cache.update(keys, values, number)
    output = reader.model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
    first, ids = output.logits[0, -1], []
    for _ in range(NEW):
        ids.append(int(output.logits[0, -1].argmax()))
        if ids[-1] == reader.prompts.eos_id:
            return first, ids[:-1]
        output = reader.model(input_ids=torch.tensor([ids[-1:]]), past_key_values=cache)
    return first, ids


def messages_of(model: Interlingua, counts: Sequence[int]) -> list[list[bytes]]:
    payloads = random_payloads(model, sum(counts))
    ends = [*accumulate(counts)]
    return [payloads[end - count : end] for end, count in zip(ends, counts, strict=True)]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_and_tokens_are_those_of_each_alone(
    reader: Reader, prefix: str, counts: tuple[int, ...]
) -> None:
    model = make_model(reader, prefix)
    messages, prompts = messages_of(model, counts), asking(reader, QUESTIONS)
    first = Receiver.of(model, reader).prefill(prompts, payloads=messages)
    expected = [plain_path(model, reader, m, p) for m, p in zip(messages, prompts, strict=True)]
    torch.testing.assert_close(
        first.logits_BV, torch.stack([row for row, _ in expected]), rtol=1e-4, atol=1e-4
    )
    assert first.generate(at_most(NEW)) == [ids for _, ids in expected]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_message_answers_all_prompts(reader: Reader, prefix: str) -> None:
    model, prompts = make_model(reader, prefix), asking(reader, QUESTIONS)
    receiver, (message,) = Receiver.of(model, reader), messages_of(model, (3,))
    shared = receiver.generate(prompts, payloads=[message], options=at_most(NEW))
    assert shared == receiver.generate(prompts, payloads=[message] * 3, options=at_most(NEW))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_scores_are_those_of_each_alone(reader: Reader, prefix: str) -> None:
    model = make_model(reader, prefix)
    receiver, messages = Receiver.of(model, reader), messages_of(model, (1, 3, 2))
    prompts = reader.prompts.build_many([Turn(q, "Bakrim") for q in QUESTIONS], latent="context")
    together = receiver.score(prompts, payloads=messages)
    alone = [
        receiver.score([prompt], payloads=[message]).gold_N
        for prompt, message in zip(prompts, messages, strict=True)
    ]
    torch.testing.assert_close(together.gold_N, torch.cat(alone), rtol=1e-4, atol=1e-4)
    shared = receiver.score(prompts, payloads=messages[1:2])
    again = receiver.score(prompts, payloads=messages[1:2] * 3)
    torch.testing.assert_close(shared.gold_N, again.gold_N, rtol=1e-4, atol=1e-4)


def test_a_list_of_one_is_a_payload(reader: Reader) -> None:
    model, prompts = make_model(reader, "both"), asking(reader, QUESTIONS)
    receiver, payloads = Receiver.of(model, reader), random_payloads(model)
    plain = receiver.prefill(prompts, payloads=payloads)
    listed = receiver.prefill(prompts, payloads=[[payload] for payload in payloads])
    assert torch.equal(plain.logits_BV, listed.logits_BV)


def test_a_kept_head_stands_before_all_of_them(reader: Reader) -> None:
    model, prompts = make_model(reader, "soft"), asking(reader, QUESTIONS)
    messages = messages_of(model, (2, 1, 3))
    plain, kept = (
        Receiver.of(model, reader, options=ReceiverOptions(keep_head=keep)).prefill(
            prompts, payloads=messages
        )
        for keep in (False, True)
    )
    torch.testing.assert_close(plain.logits_BV, kept.logits_BV, rtol=1e-4, atol=1e-4)


def test_order_matters(reader: Reader) -> None:
    model, prompts = make_model(reader, "deep"), asking(reader, QUESTIONS[:1])
    receiver, (message,) = Receiver.of(model, reader), messages_of(model, (2,))
    forward, backward = (
        receiver.prefill(prompts, payloads=[m]).logits_BV for m in (message, message[::-1])
    )
    assert not torch.allclose(forward, backward)


def test_what_cannot_be_is_refused(reader: Reader) -> None:
    model, prompts = make_model(reader, "both"), asking(reader, QUESTIONS[:2])
    receiver, payloads = Receiver.of(model, reader), random_payloads(model, 2)
    with pytest.raises(PayloadError, match="prompt 1 has no payloads"):
        receiver.prefill(prompts, payloads=[payloads, []])
    with pytest.raises(PayloadError, match=r"payload 1 of prompt 0: .*cut short"):
        receiver.prefill(prompts, payloads=[[payloads[0], payloads[1][:-1]], payloads[0]])
    with pytest.raises(PayloadError, match=r"payload 0: .*joined with something"):
        receiver.prefill(prompts[:1], payloads=[payloads[0] + payloads[1]])
    with pytest.raises(ConfigError, match=r"3 payloads for 2 prompts.*a list in the place"):
        receiver.prefill(prompts, payloads=[payloads, payloads, payloads])


def test_a_reader_with_a_table_of_positions_takes_soft_ones(reader: Reader) -> None:
    other = gpt2_reader(reader, positions=128)
    model, prompts = make_model(other, "soft"), asking(other, QUESTIONS)
    receiver, messages = Receiver.of(model, other), messages_of(model, (2, 1, 3))
    together = receiver.prefill(prompts, payloads=messages).logits_BV
    for row, (prompt, message) in enumerate(zip(prompts, messages, strict=True)):
        alone = receiver.prefill([prompt], payloads=[message]).logits_BV[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
    deep = make_model(other, "deep")
    with pytest.raises(ConfigError, match="several payloads in one prompt"):
        Receiver.of(deep, other).prefill(prompts[:1], payloads=messages_of(deep, (2,)))


@pytest.mark.usefixtures("engine")
def test_payloads_with_several_numbers_of_latents(reader: Reader) -> None:
    model, prompts = model_of(reader), asking(reader, QUESTIONS)
    receiver, payloads = Receiver.of(model, reader), model.encode_payloads(TEXTS)
    first = receiver.prefill(prompts, payloads=payloads)
    tokens = first.generate(at_most(6))
    for row, (prompt, payload) in enumerate(zip(prompts, payloads, strict=True)):
        alone = receiver.prefill([prompt], payloads=[payload])
        torch.testing.assert_close(first.logits_BV[row], alone.logits_BV[0], rtol=1e-4, atol=1e-4)
        assert tokens[row] == alone.generate(at_most(6))[0]
    mixed = receiver.prefill(prompts, payloads=[payloads, payloads[:1], payloads[1:]])
    for row, message in enumerate([payloads, payloads[:1], payloads[1:]]):
        alone = receiver.prefill(prompts[row : row + 1], payloads=[message])
        torch.testing.assert_close(mixed.logits_BV[row], alone.logits_BV[0], rtol=1e-4, atol=1e-4)
