"""Build the testbed readers from nothing: tokenizers, training, half-precision weights, score.

    python -m latentwire_fast.testbed.build --reader llama --out build/readers/llama
    python -m latentwire_fast.testbed.build --reader qwen --steps 30 --out build/short   # a trial

What made small models read at all (measured): Muon for matrices; a warm-up on shuffled random
chunks until copying works; then one, two and four facts; an eighth each of chunk rows and name-list
rows throughout; a learning rate that falls linearly to zero. At the end prompts without a question
are answered by nothing (EOS): a reader that guesses hides what a cut prompt has lost.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from latentwire_fast.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from latentwire_fast.cli import quiet_libraries, run_entry_point
from latentwire_fast.config import to_json
from latentwire_fast.errors import CheckpointError
from latentwire_fast.metrics import exact_match, f1
from latentwire_fast.optim import build_optimizers, scale_learning_rates
from latentwire_fast.prompts import Turn, full_text
from latentwire_fast.reader import Reader
from latentwire_fast.run_state import (
    load_optimizer_state,
    optimizer_state,
    restore_rng_state,
    rng_state,
)
from latentwire_fast.testbed import task
from latentwire_fast.testbed.induction import add_induction_circuit
from latentwire_fast.testbed.rows import DRILLS, RowMaker, collate, drill_rows
from latentwire_fast.testbed.tokenizers import build_llama_tokenizer, build_qwen_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How one reader is built, in steps.

    Attributes:
        lr_knots: (step, factor on the learning rates), linear in between; the last step ends the
            run.
        one_fact_from, two_facts_from, four_facts_from: the curriculum; before it, copying alone.
        final_from: from here on also prompts without a question.
    """

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    lr_knots: tuple[tuple[int, float], ...]
    final_from: int
    one_fact_from: int = 200
    two_facts_from: int = 480
    four_facts_from: int = 880
    batch_size: int = 32
    muon_lr: float = 0.01
    adamw_lr: float = 1e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.lr_knots[-1][0]

    def shortened(self, steps: int) -> Recipe:
        """The same in `steps` steps."""

        def at(step: int) -> int:
            return round(step * steps / self.steps)

        return replace(
            self,
            lr_knots=tuple((at(step), factor) for step, factor in self.lr_knots),
            one_fact_from=at(self.one_fact_from),
            two_facts_from=at(self.two_facts_from),
            four_facts_from=at(self.four_facts_from),
            final_from=at(self.final_from),
        )

    def facts_at(self, step: int) -> int:
        """Facts per passage at a step; 0 is copying alone."""
        starts = ((self.four_facts_from, 4), (self.two_facts_from, 2), (self.one_fact_from, 1))
        return next((facts for start, facts in starts if step >= start), 0)

    def lr_factor(self, step: int) -> float:
        """The learning rate's factor at a step."""
        before = (0, 0.0)
        for knot in self.lr_knots:
            if step < knot[0]:
                share = (step + 1 - before[0]) / (knot[0] - before[0])
                return before[1] + share * (knot[1] - before[1])
            before = knot
        return 0.0


RECIPES = {
    "llama": Recipe(
        "llama",
        hidden_size=160,
        layers=4,
        heads=4,
        lr_knots=((100, 1.0), (1200, 1.0), (4000, 0.0), (4001, 0.3), (4400, 0.0)),
        final_from=4000,
    ),
    "qwen": Recipe(
        "qwen2",
        hidden_size=192,
        layers=4,
        heads=6,
        lr_knots=(
            (100, 1.0),
            (1200, 1.0),
            (3000, 0.357),
            (3001, 0.6),
            (4100, 0.0),
            (4101, 0.9),
            (4800, 0.9),
            (5600, 0.0),
            (5620, 0.7),
            (6700, 0.0),
        ),
        final_from=3000,
    ),
}
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": build_llama_tokenizer,
    "qwen": build_qwen_tokenizer,
}


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised reader with tied embeddings."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 2 * recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(recipe.seed)
    if recipe.architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    add_induction_circuit(model)
    return model


class ReaderTraining:
    """Trains one reader; interrupted, it goes on from its last checkpoint.

    Args:
        checkpoints: folder for checkpoints every `SAVE_EVERY` steps; None keeps none.
    """

    SAVE_EVERY = 250

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        *,
        checkpoints: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.pad_id = tokenizer.pad_token_id
        self.model = new_model(recipe, tokenizer).train()
        self.rng = random.Random(1234 + recipe.seed)
        self.rows = RowMaker(tokenizer, self.rng)
        self.named = list(self.model.named_parameters())
        self.optimizers = build_optimizers(
            self.named, muon_lr=recipe.muon_lr, adamw_lr=recipe.adamw_lr, weight_decay=0.01
        )
        self.accuracy = {"copy": 0.0, "answer": 0.0}
        self.step = 0
        self.checkpoints = checkpoints
        latest = None if checkpoints is None else latest_checkpoint(checkpoints)
        if latest is not None:
            self._restore(load_checkpoint(latest))

    def _restore(self, saved: Checkpoint) -> None:
        if saved.state["recipe"] != to_json(self.recipe):
            raise CheckpointError(
                f"{saved.path} was made with another recipe; give the same options, or remove it"
            )
        with torch.no_grad():  # parameter by parameter: a tied head is stored once
            for name, parameter in self.named:
                parameter.copy_(saved.tensors["model"][name])
        load_optimizer_state(
            self.optimizers,
            self.named,
            tensors=saved.tensors["optimizer"],
            state=saved.state["optimizer"],
        )
        generators = {"rows": self.rng}
        restore_rng_state(generators, tensors=saved.tensors["rng"], state=saved.state["rng"])
        self.accuracy, self.step = saved.state["accuracy"], saved.step

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        if self.checkpoints is None:
            return
        optimizer_tensors, optimizer = optimizer_state(self.optimizers, self.named)
        rng_tensors, rng = rng_state({"rows": self.rng})
        save_checkpoint(
            self.checkpoints,
            step=self.step,
            tensors={"model": dict(self.named), "optimizer": optimizer_tensors, "rng": rng_tensors},
            state={
                "recipe": to_json(self.recipe),
                "optimizer": optimizer,
                "rng": rng,
                "accuracy": self.accuracy,
            },
            keep=1,
        )

    def run(self, *, progress: bool = True) -> PreTrainedModel:
        """Train to the last step."""
        bar = tqdm(
            total=self.recipe.steps,
            initial=self.step,
            disable=not progress,
            desc=f"build {self.recipe.architecture}",
            unit="step",
        )
        with bar:
            while self.step < self.recipe.steps:
                loss = self._train_step()
                self.step += 1
                bar.update()
                if self.step % 10 == 0:
                    parts = (f"{name} {value:.3f}" for name, value in self.accuracy.items())
                    bar.set_postfix_str(f"loss {loss:.3f} {' '.join(parts)}")
                if self.step % self.SAVE_EVERY == 0:
                    self.save()
        return self.model.eval()

    def _train_step(self) -> float:
        facts = self.recipe.facts_at(self.step)
        final = self.step >= self.recipe.final_from
        rows = self.rows.batch(facts, self.recipe.batch_size, unasked=final)
        ids, weights = collate(rows, self.pad_id)
        scale_learning_rates(self.optimizers, self.recipe.lr_factor(self.step))
        logits = self.model(input_ids=ids).logits[:, :-1].float()
        labels, weights = ids[:, 1:], weights[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        right, scored = logits.detach().argmax(-1) == labels, weights == 1.0
        drills = DRILLS * drill_rows(len(ids)) if facts else len(ids)
        for key, part in (("copy", slice(0, drills)), ("answer", slice(drills, None))):
            if scored[part].any():
                value = right[part][scored[part]].float().mean().item()
                self.accuracy[key] += 0.05 * (value - self.accuracy[key])
        return loss.item()


def score_reader(folder: Path, *, examples: int = 500, budget: int = 12) -> dict[str, float]:
    """Text EM and F1 of a built reader on held-out prompts, and F1 on prompts cut to `budget`
    tokens."""
    reader = Reader.load(folder, name="reader")
    held_out = task.make_examples(examples, seed=99)
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
            answers += [reader.decode(ids) for ids in reader.generate(prompts[start : start + 50])]
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
(`latentwire_fast.testbed.task`) and nothing else: invented names, six relations, English.

On {record["examples"]} held-out prompts:
exact match {record["text_em"]:.3f}, F1 {record["text_f1"]:.3f};
cut to 12 tokens, F1 {record["token_budget_f1"]:.3f}.

Built by

    python -m latentwire_fast.testbed.build --reader {name} --out DIR

from initial weights that hold a copying circuit (`latentwire_fast.testbed.induction`), on no data
but the generator's.
"""


def main() -> None:
    """Build one reader and write it as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--reader", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=500, help="held-out prompts to score on")
    args = parser.parse_args()
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
