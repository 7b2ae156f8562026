"""A receiver that keeps what prompts have before their latents answers as one that reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions, prompt_head
from receiving import asking, at_most, make_model, random_payloads

QUESTIONS = ["Where does Nulnak live?", "What?", "What is the job of Selpon, if any?"]
KEEPS = ReceiverOptions(keep_head=True)


def spy_on_heads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that were read as heads."""
    read: list[list[int]] = []
    keys_values = prompt_head.keys_values

    def noted(reader: Reader, ids: Any) -> torch.Tensor:
        read.append([*ids])
        return keys_values(reader, ids)

    monkeypatch.setattr(prompt_head, "keys_values", noted)
    return read


@pytest.mark.usefixtures("engine")
def test_answers_are_the_same_and_the_head_is_read_once(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = spy_on_heads(monkeypatch)
    model = make_model(reader)
    plain, keeping = Receiver.of(model, reader), Receiver.of(model, reader, options=KEEPS)
    prompts = asking(reader, QUESTIONS)
    head = prompts[0].ids[: prompts[0].latent_at]
    assert head
    for rows in (3, 1, 3):
        payloads = random_payloads(model, rows)
        first, expected = (
            receiver.prefill(prompts[:rows], payloads=payloads) for receiver in (keeping, plain)
        )
        largest = float(expected.logits_BV.abs().max())
        torch.testing.assert_close(
            first.logits_BV, expected.logits_BV, rtol=1e-5, atol=1e-5 * largest
        )
        assert first.generate(at_most(6)) == expected.generate(at_most(6))
    assert read == [head]
    assert first.cache.get_seq_length() == first.positions
    other = [Prompt([5, *p.ids], (p.latent_at or 0) + 1, [False, *p.is_target]) for p in prompts]
    for asked in (other, [*prompts[:2], other[2]]):
        payloads = random_payloads(model)
        answers = keeping.generate(asked, payloads=payloads, options=at_most(4))
        assert answers == plain.generate(asked, payloads=payloads, options=at_most(4))
    assert read == [head, [5, *head]], "several heads in one batch are read with their prompts"


def test_few_heads_are_kept(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_head, "_KEPT", 2)
    read = spy_on_heads(monkeypatch)
    heads = prompt_head.PromptHeads(reader)
    for first in (5, 6, 5, 7, 5, 6):
        head = heads.of([Prompt([first, 9, 8], 2, [False] * 3)])
        assert head is not None
        assert head.ids == (first, 9)
    assert read == [[5, 9], [6, 9], [7, 9], [6, 9]]


def test_where_nothing_can_be_kept_everything_is_read(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deep prefix has keys and values of its own before the prompt; low-rank updates may be
    switched off; faulty prompts are refused as ever."""
    read = spy_on_heads(monkeypatch)
    prompts = asking(reader, QUESTIONS)
    deep = make_model(reader, "both")
    payloads = random_payloads(deep)
    expected = Receiver.of(deep, reader).generate(prompts, payloads=payloads, options=at_most(3))
    keeping = Receiver.of(deep, reader, options=KEEPS)
    assert keeping.generate(prompts, payloads=payloads, options=at_most(3)) == expected
    soft = make_model(reader)
    keeping = Receiver.of(soft, reader, options=KEEPS)
    with pytest.raises(ConfigError, match="built as text"):
        keeping.prefill([Prompt([5, 6])], payloads=payloads[:1])
    with pytest.raises(ConfigError, match="knows"):
        keeping.prefill([Prompt([10**6, 6], 1, [False] * 2)], payloads=payloads[:1])
    with pytest.raises(ConfigError, match="no prompts"):
        keeping.prefill([], payloads=payloads[:1])
    monkeypatch.setattr(reader, "lora", SimpleNamespace(merged=False))
    keeping.prefill(prompts, payloads=payloads)
    assert read == []
