"""Build the testbed readers from nothing: tokenizers, training, half-precision weights, score.

python -m latentwire_fast.testbed.build --reader llama --out build/readers/llama
python -m latentwire_fast.testbed.build --reader qwen --steps 30 --out build/short   # a trial
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from latentwire_fast.cli import quiet_libraries, run_entry_point
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data import testbed
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.metrics import exact_match, f1
from latentwire_fast.prompts.builder import Turn, full_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from latentwire_fast.testbed.recipes import RECIPES
from latentwire_fast.testbed.tokenizers import (
    build_llama_tokenizer,
    build_mistral_tokenizer,
    build_qwen_tokenizer,
)
from latentwire_fast.testbed.training import ReaderTraining

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": build_llama_tokenizer,
    "qwen": build_qwen_tokenizer,
    "mistral": build_mistral_tokenizer,
}


def score_reader(folder: Path, *, examples: int = 500, budget: int = 12) -> dict[str, float]:
    """Text EM and F1 of a built reader on held-out prompts, and F1 on prompts cut to `budget`
    tokens."""
    reader = Reader.load(folder, name="reader")
    receiver = Receiver.for_text(reader)
    held_out = testbed.make_examples(examples, seed=99)
    scores: dict[str, float] = {}
    for method in ("text", "token_budget"):
        prompts = []
        for example in held_out:
            text = full_text(example.context, example.question)
            ids = None if method == "text" else reader.prompts.text_ids(text)[:budget]
            turn = Turn(example.question)
            prompts.append(reader.prompts.build([turn], context=example.context, user_ids=ids))
        answers = []
        for start in range(0, examples, 50):
            ids_of = receiver.generate(prompts[start : start + 50])
            answers += [reader.decode(ids) for ids in ids_of]
        pairs = list(zip(answers, held_out, strict=True))
        scores[f"{method}_em"] = sum(exact_match(a, e.answers) for a, e in pairs) / examples
        scores[f"{method}_f1"] = sum(f1(a, e.answers) for a, e in pairs) / examples
    return scores


def model_card(name: str, record: dict[str, Any]) -> str:
    """The README.md of a built reader."""
    recipe = record["recipe"]
    return f"""---
license: apache-2.0
---
# Testbed reader `{name}`

A {recipe["architecture"]} of {recipe["layers"]} layers, width {recipe["hidden_size"]},
{record["parameters"]:,} parameters, in half precision. It reads passages of the built-in task
(`latentwire_fast.data.testbed`) and nothing else: invented names, six relations, English.

On {record["examples"]} held-out prompts:
exact match {record["text_em"]:.3f}, F1 {record["text_f1"]:.3f};
cut to 12 tokens, F1 {record["token_budget_f1"]:.3f}.

Built by

    python -m latentwire_fast.testbed.build --reader {name} --out DIR

from initial weights that hold a copying circuit (`latentwire_fast.testbed.induction`), on no data
but the generator's.
"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected at least 1")
    return value


def main() -> None:
    """Build one reader and write it as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--reader", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=_positive, help="instead of the recipe's")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument(
        "--examples", type=_positive, default=500, help="held-out prompts to score on"
    )
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"{args.out} is no folder; choose another --out")
    quiet_libraries()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.reader]
    if args.steps:
        recipe = recipe.shortened(args.steps)
    tokenizer = TOKENIZERS[args.reader]()
    start = time.process_time()
    checkpoints = args.out.with_name(args.out.name + "-checkpoints")
    training = ReaderTraining(recipe, tokenizer, checkpoints=checkpoints)
    try:
        model = training.run()
    except KeyboardInterrupt:
        training.save()
        raise
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "recipe": to_json(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": time.process_time() - start,
        "examples": args.examples,
        **score_reader(args.out, examples=args.examples),
    }
    (args.out / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "README.md").write_text(model_card(args.reader, record))
    shutil.rmtree(checkpoints, ignore_errors=True)
    print(json.dumps(record))


if __name__ == "__main__":
    run_entry_point(main)
