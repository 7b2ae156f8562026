"""Models and tokenizers that do not go together, and prompts longer than a model reads."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import AddedToken

from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.checks import check_vocabulary, learns_positions
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.serving import Receiver
from latentwire_fast.training.builders import build_model
from readers import tiny_model
from runs import changed, tiny_config


def gpt2(tokenizer: PreTrainedTokenizerFast, *, positions: int) -> PreTrainedModel:
    """A model with a table of so many positions."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=positions,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def extended(
    tokenizer: PreTrainedTokenizerFast, *tokens: str | AddedToken
) -> PreTrainedTokenizerFast:
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(list(tokens))
    return longer


def prompt_of(reader: Reader, example: Example) -> Prompt:
    turn = Turn(example.question, example.answers[0])
    return reader.prompts.build([turn], context=example.context)


# --- tokens -------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Found before a text holds one: then it is an IndexError, on a GPU the end of the process."""
    rows = len(llama_tokenizer)
    longer = extended(llama_tokenizer, "Zyzzyva", "Fosvun")
    model = tiny_model("llama", llama_tokenizer)
    expected = rf"has 2 tokens .* first is 'Zyzzyva', number {rows} of {rows}\)"
    with pytest.raises(ConfigError, match="reader 'long': its tokenizer " + expected):
        Reader(model, longer, name="long")
    model.save_pretrained(tmp_path)
    longer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"encoder LM '{tmp_path}': its tokenizer {expected}"):
        build_encoder(ENCODERS.config("lm", source=str(tmp_path)), {})


def test_control_tokens_of_a_larger_model_are_passed_over(
    llama_tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    """No text is tokenised to one; a pad token without an embedding gives way to EOS."""
    longer = extended(llama_tokenizer, AddedToken("<|image|>", special=True))
    longer.add_special_tokens({"pad_token": "[PAD]"})
    model = tiny_model("llama", llama_tokenizer)
    assert longer.pad_token_id == len(llama_tokenizer) + 1
    reader = Reader(model, longer, name="larger")
    assert reader.pad_id == reader.prompts.eos_id
    prompts = [prompt_of(reader, e) for e in (examples[0], examples[-1])]
    assert reader.collate(prompts).ids_BT.max() < len(llama_tokenizer)


def test_an_embedding_with_rows_to_spare_is_no_matter(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("llama", extended(llama_tokenizer, "Zyzzyva"))
    assert check_vocabulary(llama_tokenizer, model, name="reader") is None


# --- positions ----------------------------------------------------------------------------------


def test_tables_of_positions_are_told_from_computed_ones(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert learns_positions(gpt2(llama_tokenizer, positions=64))
    assert not learns_positions(tiny_model("llama", llama_tokenizer))
    assert not learns_positions(tiny_model("qwen2", llama_tokenizer))


def test_a_prompt_beyond_the_table_is_refused_and_the_longest_is_read(
    llama_tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    probe = Reader(gpt2(llama_tokenizer, positions=512), llama_tokenizer, name="gpt")
    prompt = prompt_of(probe, examples[-1])
    length = len(prompt.ids)
    fits = Reader(gpt2(llama_tokenizer, positions=length), llama_tokenizer, name="gpt")
    assert fits.target_hidden(fits.collate([prompt])).shape[1] == 32
    short = Reader(gpt2(llama_tokenizer, positions=length - 1), llama_tokenizer, name="gpt")
    with pytest.raises(
        DataError, match=rf"{length} positions, reader 'gpt' knows {length - 1}; shorten"
    ):
        short.collate([prompt])


def test_an_answer_ends_where_the_table_does(
    llama_tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    probe = Reader(gpt2(llama_tokenizer, positions=512), llama_tokenizer, name="gpt")
    prompt = probe.prompts.build([Turn("Who?")], context=examples[0].context)
    limit = len(prompt.ids) + 3
    model = gpt2(llama_tokenizer, positions=limit)
    reader = Reader(model, llama_tokenizer, name="gpt")
    options = DecodeOptions(max_new_tokens=9, eos_ban_steps=9)
    (ids,) = Receiver.for_text(reader).generate([prompt], options=options)
    assert len(ids) == 4, "three are read again, and one is said after the last of them"


def test_other_readers_warn_once(
    llama_tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama", llama_tokenizer)
    model.config.max_position_embeddings = 20
    reader = Reader(model, llama_tokenizer, name="llama")
    prompt = prompt_of(reader, examples[-1])
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            reader.target_hidden(reader.collate([prompt]))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert f"{len(prompt.ids)} positions, reader 'llama' knows 20: what it says" in caplog.text


@pytest.mark.parametrize("pooler", ["queries", "spans"])
def test_an_encoder_reads_no_further_than_its_lms_table(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, pooler: str
) -> None:
    gpt2(llama_tokenizer, positions=40).save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    source = ENCODERS.config(
        "lm", source=str(tmp_path), latents=4, d_z=8, pooler=POOLERS.config(pooler)
    )
    encoder = build_encoder(source, {})
    prompt = encoder.prompts.build([Turn("Who?")], context="Nulnak is old.")
    read = 40 - 4 - (len(prompt.ids) - prompt.content)
    assert encoder.config == replace(source, max_tokens=read)
    long = ["Nulnak is already 94 years old. " * 20]
    assert encoder(long).shape == (1, 4, 8)
    for question in ("Who?", "How old is Nulnak? " * 20):
        assert encoder(long, [question]).shape == (1, 4, 8)
    short = replace(source, max_tokens=9)
    assert build_encoder(short, {}).config == short
    with pytest.raises(ConfigError, match="no position left for a text beside 40 latents"):
        build_encoder(replace(source, latents=40), {})


def test_a_model_knows_how_far_its_encoder_reads(
    llama_tokenizer: PreTrainedTokenizerFast, llama_folder: Path, tmp_path: Path
) -> None:
    gpt2(llama_tokenizer, positions=40).save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    config = changed(tiny_config(llama_folder), encoder={"source": str(tmp_path)})
    model = build_model(config, load_readers(config.readers))
    assert model.encoder_config.max_tokens < 40 < config.encoder.max_tokens
    loaded = Interlingua.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert loaded.encoder.config == loaded.encoder_config == model.encoder_config
