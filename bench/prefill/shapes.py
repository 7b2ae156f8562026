"""Readers, encoders and texts for the prefill benchmark.

A shape is a published model's configuration, built with random weights on the device: how long a
prefill takes does not depend on what the weights are. Such a reader has no tokenizer of its own and
gets the testbed's, so that text rows do tokenise: the same library and kind (byte-pair encoding in
Rust) with a vocabulary of under a thousand, hence fewer bytes per token than the published one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from latentwire_fast.data.squad import load_squad
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.prompts.builder import (
    Prompt,
    PromptBuilder,
    Turn,
    context_text,
    question_text,
)
from latentwire_fast.readers.loading import load_tokenizer
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.shapes import KNOWN, decoder_sizes, model_config
from latentwire_fast.registry import ENCODERS

SMALL = decoder_sizes(vocabulary=32000, width=768, inner=3072, layers=12, heads=12, kv_heads=12)
TINY = decoder_sizes(vocabulary=1000, width=32, inner=64, layers=2, heads=4, kv_heads=2)
LITTLE = decoder_sizes(vocabulary=32000, width=512, inner=1376, layers=8, heads=8, kv_heads=8)
POSITIONS = 8192
# Llama-3.1-8B and Qwen2.5-7B as on the hub; the others are ours: named after their parameters, or
# for tests.
SHAPES: dict[str, LlamaConfig | Qwen2Config] = {
    "llama-3.1-8b": KNOWN["meta-llama/Llama-3.1-8B-Instruct"],
    "qwen2.5-7b": KNOWN["Qwen/Qwen2.5-7B-Instruct"],
    "llama-160m": LlamaConfig(**SMALL, max_position_embeddings=POSITIONS),
    "qwen2-160m": Qwen2Config(
        **{**SMALL, "intermediate_size": 3328, "num_key_value_heads": 4},
        max_position_embeddings=POSITIONS,
    ),
    "llama-58m": LlamaConfig(**LITTLE, max_position_embeddings=POSITIONS),
    "llama-tiny": LlamaConfig(**TINY, max_position_embeddings=POSITIONS),
    "qwen2-tiny": Qwen2Config(**TINY, max_position_embeddings=POSITIONS),
}


def config_of(source: str) -> Any:
    """The configuration of a shape, a local folder or a hub id.

    Raises:
        ConfigError: it is none of them.
    """
    if source in SHAPES:
        return SHAPES[source]
    try:
        return model_config(source)
    except ConfigError as error:
        raise ConfigError(
            f"{source!r} is neither a shape ({', '.join(SHAPES)}) nor a model that can be loaded: "
            f"{error}"
        ) from error


def build_reader(
    source: str, *, dtype: torch.dtype, device: str, attention: str, load_in_4bit: bool = False
) -> Reader:
    """A shape with random weights, made on the device; anything else as `Reader.load` does."""
    if source not in SHAPES:
        return Reader.load(
            source,
            name=source,
            dtype=dtype,
            device=device,
            attn_implementation=attention,
            load_in_4bit=load_in_4bit,
        )
    if load_in_4bit:
        raise ConfigError(f"{source} has random weights; 4-bit readers are loaded from files")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            SHAPES[source], dtype=dtype, attn_implementation=attention
        )
    return Reader(model, tokenizer_for(source), name=source)


def build_encoder(
    source: str, *, latents: int, d_z: int, max_tokens: int, dtype: torch.dtype, device: str
) -> LMEncoder:
    """An LM encoder of a shape, with random weights."""
    if source not in SHAPES:
        raise ConfigError(f"--encoder {source!r}: there are {sorted(SHAPES)}")
    config = ENCODERS.config("lm", source=source, latents=latents, d_z=d_z, max_tokens=max_tokens)
    with torch.device(device):
        core = AutoModel.from_config(SHAPES[source], dtype=dtype)
        encoder = LMEncoder(core, tokenizer_for(source), config)
    return encoder.eval().requires_grad_(False)


def tokenizer_for(shape: str) -> Any:
    """The testbed's tokenizer that a shape gets."""
    return load_tokenizer("testbed:qwen" if shape.startswith("qwen") else "testbed:llama")


@dataclass(frozen=True)
class Workload:
    """Contexts with a question each, one per row of a batch.

    Attributes:
        tokens: of a context, the longest of them.
    """

    contexts: list[str]
    questions: list[str]
    tokens: int

    @property
    def text_bytes(self) -> float:
        """UTF-8 bytes of a context, on average."""
        return sum(len(c.encode()) for c in self.contexts) / len(self.contexts)


def synthetic_workload(prompts: PromptBuilder, *, rows: int, tokens: int, seed: int) -> Workload:
    """Testbed passages, as many as it takes; every row has the same number of tokens."""
    rng = random.Random(seed)
    # A passage has at least 30 tokens.
    examples = make_examples(rows * (tokens // 30 + 1), seed=rng.randrange(2**31))
    per_row = len(examples) // rows
    contexts, questions = [], []
    for i in range(rows):
        mine = examples[i * per_row : (i + 1) * per_row]
        words = " ".join(e.context for e in mine).split(" ")
        contexts.append(_cut(prompts, words, tokens))
        questions.append(mine[0].question)
    return _workload(prompts, contexts, questions)


def workload_from_file(prompts: PromptBuilder, path: Path, *, rows: int) -> Workload:
    """The first contexts and questions of a SQuAD-format file."""
    examples = load_squad(path)[:rows]
    if len(examples) < rows:
        raise ConfigError(f"{path} has {len(examples)} examples, a batch of {rows} needs as many")
    return _workload(prompts, [e.context for e in examples], [e.question for e in examples])


def _workload(prompts: PromptBuilder, contexts: list[str], questions: list[str]) -> Workload:
    longest = max(len(prompts.text_ids(context_text(c))) for c in contexts)
    return Workload(contexts, questions, longest)


def _cut(prompts: PromptBuilder, words: Sequence[str], tokens: int) -> str:
    """The longest text of whole words within so many tokens, filled up with a short one."""

    def length(text: str) -> int:
        return len(prompts.text_ids(context_text(text)))

    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if length(" ".join(words[:middle])) <= tokens else (low, middle - 1)
        )
    text = " ".join(words[:low])
    while length(longer := f"{text} a") <= tokens:
        text = longer
    return text


def text_prompts(prompts: PromptBuilder, workload: Workload) -> list[Prompt]:
    """Text prompts of a batch, tokenised together: the fastest way that the library has."""
    turns = [Turn(question) for question in workload.questions]
    return prompts.build_many(turns, contexts=workload.contexts)


def split_prompts(prompts: PromptBuilder, workload: Workload) -> tuple[list[list[int]], list[str]]:
    """Text prompts of a batch cut before the last word of their contexts.

    Tokens are cut, not texts: tokenizers join the end of a context with what follows (".\n" is one
    token of Llama 3 and Qwen2), but none across the space before a word.

    Returns:
        The ids of each prompt up to there, and the rest of its text.

    Raises:
        ConfigError: a tokenizer that does join there.
    """
    rests = [
        " " + context_text(context).rpartition(" ")[2] + question_text(question)
        for context, question in zip(workload.contexts, workload.questions, strict=True)
    ]
    held = []
    for whole, rest in zip(
        text_prompts(prompts, workload), rest_prompts(prompts, rests), strict=True
    ):
        cut = len(whole.ids) - len(rest.ids)
        if whole.ids[cut:] != rest.ids:
            raise ConfigError(
                "this tokenizer joins the last word of a context with the one before it; keys and "
                "values of the words before it cannot be reused"
            )
        held.append(whole.ids[:cut])
    return held, rests


def rest_prompts(prompts: PromptBuilder, rests: list[str]) -> list[Prompt]:
    """Prompts of what follows the held part: the rest of the text, then template and anchor."""
    whole = [
        prompts.build([Turn("")], context=None, user_ids=ids)
        for ids in prompts.text_ids_of_many(rests)
    ]
    return [Prompt(prompt.ids[prompts.content_start :]) for prompt in whole]
