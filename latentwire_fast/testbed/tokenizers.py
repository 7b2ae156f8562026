"""The testbed tokenizers: a byte-level BPE for the Llama reader, Metaspace BPEs for the other two.

All are trained on training passages and lists of names, at sizes where every name is exactly two
tokens, every other value word one, and every age two, but for one age of the Mistral reader. (A
vocabulary that cuts names unevenly held the reader's copy accuracy at 0.8.) Their control tokens
and chat templates differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latentwire_fast.data.testbed import make_passage, random_name
from latentwire_fast.prompts.builder import ANCHOR, full_text

PRINTABLE = [*map(chr, range(33, 127)), "\n"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _corpus(seed: int, passages: int = 6000) -> Iterator[str]:
    """Passages with one question each, and lists of names so that syllables merge before word
    parts."""
    rng = random.Random(seed)
    for _ in range(passages):
        passage = make_passage(rng, split="train")
        question, answer = passage.questions[0]
        yield f"{full_text(passage.context, question)}\n{ANCHOR} {answer}"
        yield " ".join(random_name(rng) for _ in range(12))


def _train(tokenizer: Tokenizer, *, seed: int, **options: Any) -> None:
    """Learn the merges; `options` are the trainer's."""
    trainer = trainers.BpeTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator(_corpus(seed), trainer)


def build_llama_tokenizer(*, vocab_size: int = 920, seed: int = 7) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of Llama 3, with `<s>`, `</s>` and `[INST]` markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(
        tokenizer,
        seed=seed,
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", "[INST]", "[/INST]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"],
        chat_template=LLAMA_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_qwen_tokenizer(*, vocab_size: int = 720, seed: int = 8) -> PreTrainedTokenizerFast:
    """A Metaspace BPE without BOS, with ChatML-like markers; unknown characters become `<unk>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    _train(
        tokenizer,
        seed=seed,
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"],
        initial_alphabet=PRINTABLE,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=QWEN_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_mistral_tokenizer(*, vocab_size: int = 710, seed: int = 9) -> PreTrainedTokenizerFast:
    """A Metaspace BPE that begins every text with a space, in the manner of Mistral 7B."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    _train(
        tokenizer,
        seed=seed,
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<unk>"],
        initial_alphabet=PRINTABLE,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        chat_template=LLAMA_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
