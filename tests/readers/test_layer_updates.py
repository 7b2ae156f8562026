"""Updates of hidden states between a reader's layers: there for one call, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from families import OTHERS, READERS, Family
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.kv_cache import decoder_layers
from latentwire_fast.readers.layer_updates import hidden_sizes, updated_layers, why_no_updates
from latentwire_fast.readers.reader import Reader

FAMILIES = [*READERS, *(family for family, found in OTHERS if "reads" not in found)]


def hooks(reader: Reader) -> int:
    return sum(len(layer._forward_hooks) for layer in decoder_layers(reader.model))


def hidden(reader: Reader) -> Tensor:
    prompt = reader.prompts.build([Turn("Who?", "he")], context="Nulnak is 94.")
    with torch.no_grad():
        return reader.backbone(input_ids=torch.tensor([prompt.ids])).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_takes_them(family: Family, llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """The state behind a layer is what the next one gets: doubled, and behind the last one too."""
    try:
        model = family.model(llama_tokenizer)
    except (ValueError, KeyError) as error:
        pytest.skip(f"not in this transformers: {error}")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert why_no_updates(model, ids, width=64) == ""
    assert all(size > 0 for size in hidden_sizes(model, ids))
    assert "[1, 4, 32] is expected" in why_no_updates(model, ids, width=32)


def test_they_are_gone_behind_the_block_and_after_errors(reader: Reader) -> None:
    plain = hidden(reader)
    before = hooks(reader)  # transformers leaves hooks of its own where it has given layers' states
    with updated_layers(reader.model, {0: lambda x: x + 1, 1: lambda x: 2 * x}):
        assert hooks(reader) == before + 2
        assert not torch.equal(hidden(reader), plain)
    assert hooks(reader) == before
    assert torch.equal(hidden(reader), plain)

    def fail(_: Tensor) -> Tensor:
        raise ConfigError("nothing fits")

    with pytest.raises(ConfigError, match="nothing fits"), updated_layers(reader.model, {0: fail}):
        hidden(reader)
    with pytest.raises(IndexError), updated_layers(reader.model, {0: fail, 99: fail}):
        pass
    assert hooks(reader) == before
    with updated_layers(reader.model, None), updated_layers(reader.model, {}):
        assert hooks(reader) == before


def test_a_reader_that_takes_none_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are run without their hooks."""
    family = next(family for family in READERS if family.name == "Llama")
    reader = Reader(family.model(llama_tokenizer), llama_tokenizer, name="other")
    layer = decoder_layers(reader.model)[1]
    monkeypatch.setattr(type(layer), "__call__", lambda self, *a, **k: self.forward(*a, **k))
    with pytest.raises(
        ConfigError,
        match=r"reader 'other' \(llama\) takes nothing between its layers: a forward pass runs "
        "layer 0 0 times where hooks see it; give it soft tokens or a deep prefix",
    ):
        reader.require("layers")
