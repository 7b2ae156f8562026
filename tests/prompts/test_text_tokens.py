"""F23: what a user wrote stays text, whatever it spells and however a tokenizer is built."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from latentwire_fast.config.schema import PromptConfig
from latentwire_fast.prompts.builder import PromptBuilder, Turn
from latentwire_fast.prompts.text_tokens import TextTokenizer, control_ids

CONTROLS = ["<|User|>", "<think>", "</think>"]
ALPHABET = [chr(c) for c in range(33, 127)]
CORPUS = ["Context: the think User red lamp\nQuestion: who is it?\nAnswer: 94 Nulnak"] * 3


def wrapped(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", **options
    )


def trained(tokenizer: Tokenizer) -> Tokenizer:
    alphabet = [*ALPHABET, "▁", "\n", *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "</s>"],
            initial_alphabet=sorted({*alphabet}),
            show_progress=False,
        ),
    )
    return tokenizer


def byte_level(*, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer)


def llama_2() -> Tokenizer:
    """Sentencepiece as Llama 2 has it: a normalizer puts a space before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # of the training only
    trained(tokenizer).pre_tokenizer = None
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return trained(tokenizer)


def lower_case() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def unigram() -> Tokenizer:
    """Its model knows the control tokens itself, and likes them best."""
    pieces = [("<unk>", -9.0), ("</s>", 0.0), ("<think>", 0.0), ("▁", -3.0), ("\n", -3.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((c, -4.0) for c in ALPHABET)], unk_id=0))
    tokenizer.normalizer = normalizers.Replace(Regex(" "), "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level with a space before": lambda: byte_level(prefix=True),
    "Llama 2": llama_2,
    "Metaspace never": lambda: metaspace("never"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace always": lambda: metaspace("always"),
    "unigram": unigram,
}
KINDS = {
    "plain": {},
    "strips left": {"lstrip": True},
    "strips right": {"rstrip": True},
    "strips both": {"lstrip": True, "rstrip": True},
    "normalized": {"normalized": True},
    "single word": {"single_word": True},
    "special": {"special": True},
}
TEXTS = [
    "<think>",
    "a <think> b</think>",
    "<|User|><|User|>  <think>\n</think>x",
    "  <think>  red  lamp <|User|> </s> é",
    "<<think>> <thin</think>k>",
    "no control at all",
    "",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_user_text_stays_text_whatever_it_spells(name: str, kind: str) -> None:
    tokenizer = wrapped(TOKENIZERS[name]())
    tokenizer.add_tokens([AddedToken(c, **KINDS[kind]) for c in CONTROLS])
    text = TextTokenizer(tokenizer)
    controls = control_ids(tokenizer).keys() - {tokenizer.unk_token_id}
    assert {tokenizer.convert_tokens_to_ids(c) for c in CONTROLS} <= controls
    together = text.ids_of_many(TEXTS)
    for wrote, ids in zip(TEXTS, together, strict=True):
        assert controls.isdisjoint(ids), wrote
        assert text.ids(wrote) == ids
        ends = text.ends(wrote)
        assert len(ends) == len(ids)
        assert ends == sorted(ends)
        assert not ends or ends[-1] == len(wrote)
        if "é" not in wrote:
            assert tokenizer.decode(ids) == wrote


def test_a_token_that_the_normalizer_makes_is_found_too() -> None:
    tokenizer = wrapped(lower_case())
    tokenizer.add_tokens([AddedToken("<think>", normalized=True)])
    text, control = TextTokenizer(tokenizer), tokenizer.convert_tokens_to_ids("<think>")
    assert control in tokenizer("a <THINK> b", add_special_tokens=False)["input_ids"]
    ids = text.ids("a <THINK> b")
    assert control not in ids
    assert tokenizer.decode(ids) == "a <think> b"
    assert len(text.ends("a <THINK> b")) == len(ids)


def test_added_white_space_is_text(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """Some vocabularies hold runs of spaces and line breaks as added tokens."""
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.add_tokens(["    ", "\n\n", "▁▁", "<think>"])
    runs = [tokenizer.convert_tokens_to_ids(run) for run in ("    ", "\n\n")]
    ids = TextTokenizer(tokenizer).ids("a    b\n\nc <think>")
    assert {*runs} <= {*ids}
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids


def test_a_text_without_control_tokens_is_tokenised_as_ever(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "Nulnak is already 94 years old.\nQuestion: <b>Who?"
    plain = llama_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert TextTokenizer(llama_tokenizer).ids(text) == plain
    assert TextTokenizer(llama_tokenizer).ids_of_many([]) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_those_of_the_whole(name: str) -> None:
    """Tokenizers that put a space before every text would put one before each piece of a prompt."""
    builder = PromptBuilder(wrapped(TOKENIZERS[name]()))
    assert builder.check_alignment(["94", "red lamp", "Nulnak"]) == []
    prompt = builder.build([Turn("who?", "94")], context="red lamp")
    text = "Context: red lamp\nQuestion: who?\nAnswer: 94</s>"
    assert builder.tokenizer.decode(prompt.ids) == text


@pytest.mark.parametrize("anchor", ["text", "chat", "none"])
def test_nothing_that_a_prompt_is_made_of_holds_a_control_token_of_the_user(
    qwen_tokenizer: PreTrainedTokenizerFast, anchor: str
) -> None:
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.add_tokens(CONTROLS)
    builder = PromptBuilder(tokenizer, PromptConfig(anchor=anchor))  # type: ignore[arg-type]
    controls = {tokenizer.convert_tokens_to_ids(c) for c in CONTROLS}
    spelled = "a" + " ".join(CONTROLS)
    turns = [Turn(spelled, spelled), Turn(spelled, spelled)]
    for latent in (None, "context", "pure"):
        assert controls.isdisjoint(builder.build(turns, context=spelled, latent=latent).ids)
        (together,) = builder.build_many(turns[:1], contexts=[spelled], latent=latent)
        assert together == builder.build(turns[:1], context=spelled, latent=latent)
    assert controls.isdisjoint(builder.build_context(spelled).ids)
    assert controls.isdisjoint(builder.build_rebuild(spelled).ids)
    assert builder.check_alignment([spelled]) == []
