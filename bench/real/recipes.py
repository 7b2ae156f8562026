"""What context mode learns from: the recipe of `squad_small` beside others, at equal steps.

    python -m bench.real.recipes runs/recipes --data train.json --eval-data eval.json
    python -m bench.real.recipes runs/recipes-testbed --testbed

Every recipe has the same readers, encoder width, prefix, data, optimiser and number of steps:

* `attention`: the prefix learns what attention gets from the text, then the answers beside it;
* `selected_kv`: latents at positions of the text that are learned from the answers' attention, the
  prefix learns the reader's own keys and values there, then the answers (the testbed's recipe);
* `autoencode`: the reader repeats the text from its latent and goes on with it, then the answers;
* `answer`: the answers alone.

The seconds of training stand beside the scores: a recipe that goes backward through the readers in
every step takes longer for the same steps. A run that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import latentwire_fast
from bench.command_line import parser_of
from latentwire_fast.cli import quiet_libraries
from latentwire_fast.config.assignments import with_assignments
from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import squad_small, testbed_context, weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.errors import LatentWireError
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.registry import POOLERS

METHODS = ("text", "latent", "shuffled_latent", "zero_latent", "closed_book")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("recipes")
    add = parser.add_argument
    add("out", type=Path, help="folder of the runs and of recipes.json")
    add("--testbed", action="store_true", help="the testbed's readers and passages")
    add("--data", help="what to train on, as of latentwire_fast.train")
    add("--eval-data", help="what to score on")
    add("--reader", action="append", default=[], help="NAME=SOURCE in the place of the preset's")
    add("--encoder", help="its LM, in the place of the preset's")
    add("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    add("--steps", type=int, default=400, help="of each recipe, all stages together")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--examples", type=int, default=64, help="held-out questions")
    add("--set", action="append", default=[], help="PATH=VALUE, as of latentwire_fast.train")
    return parser.parse_args(arguments)


def _attention(steps: int, few: int) -> tuple[StageConfig, ...]:
    held, answer = steps // 6, steps // 4
    both = weighted(answer=1.0, attention=0.5)
    return (
        StageConfig("held", held, weighted(attention=1.0), hold_encoder=True),
        StageConfig("match", steps - held - answer, weighted(attention=1.0)),
        StageConfig("answer", answer, both, lr=0.5, batch_size=few),
    )


def _selected_kv(steps: int, few: int) -> tuple[StageConfig, ...]:
    select, answer = steps // 10, steps // 4
    return (
        StageConfig("select", select, weighted(select=1.0, kv=1.0)),
        StageConfig("match", steps - select - answer, weighted(kv=1.0)),
        StageConfig("answer", answer, lr=0.5, batch_size=few),
    )


def _autoencode(steps: int, few: int) -> tuple[StageConfig, ...]:
    answer = steps // 4
    again = weighted(autoencode=0.2, continuation=0.8)
    return (
        StageConfig("pretrain", steps - answer, again, batch_size=few),
        StageConfig("answer", answer, lr=0.5, batch_size=few),
    )


def _answer(steps: int, few: int) -> tuple[StageConfig, ...]:
    return (StageConfig("answer", steps, batch_size=few),)


RECIPES = {
    "attention": _attention,
    "selected_kv": _selected_kv,
    "autoencode": _autoencode,
    "answer": _answer,
}


def config_of(recipe: str, *, seed: int, args: argparse.Namespace) -> RunConfig:
    """The run of one recipe.

    Raises:
        ConfigError: an argument that cannot be.
    """
    base = squad_small()
    few = next(stage.batch_size for stage in base.stages if stage.batch_size)
    if args.testbed:
        own = testbed_context()
        base = replace(
            base,
            threads=own.threads,
            readers=own.readers,
            encoder=base.encoder.with_source("testbed:llama"),
            data=own.data,
            optim=replace(base.optim, mixed_precision="no"),
        )
        few = base.optim.batch_size  # its answers cost no more than its other objectives
    encoder = base.encoder
    if recipe == "selected_kv":
        own_pooler: dict[str, Any] = {"pooler": POOLERS.config("selected")}
        encoder = replace(encoder, **own_pooler)
    config = replace(
        base,
        preset=f"recipe_{recipe}",
        encoder=encoder,
        stages=RECIPES[recipe](args.steps, few),
        evaluation=replace(base.evaluation, bits=(16, 6)),
    )
    readers = dict(pair.split("=", 1) for pair in args.reader)
    config = with_overrides(
        config,
        readers=readers,
        encoder=args.encoder,
        data=args.data,
        eval_data=args.eval_data,
        seed=seed,
        eval_examples=args.examples,
    )
    return with_assignments(config, args.set)


def run(recipe: str, *, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: trained and scored, or read from its folder. A row of the table."""
    folder = args.out / f"{recipe}-seed{seed}"
    shared = args.out / "frozen_work"  # what frozen models compute, keyed by what it was made of
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    kept = RunFolder(folder).frozen_work
    if not kept.exists():
        kept.symlink_to(shared.resolve(), target_is_directory=True)
    metrics = latentwire_fast.train(config_of(recipe, seed=seed, args=args), folder)
    assert metrics is not None
    *_, last = RunFolder(folder).diagnostics.read_text().splitlines()
    row: dict[str, Any] = {"recipe": recipe, "seed": seed, "steps": args.steps}
    row["seconds"] = json.loads(last)["seconds"]
    row["nll"] = {
        name: {way: reader[way]["nll_per_token"] for way in METHODS}
        for name, reader in metrics["readers"].items()
    }
    row["f1"] = {
        name: {way: reader[way]["f1"] for way in METHODS}
        for name, reader in metrics["readers"].items()
    }
    row["latent_minus"] = metrics["latent_minus"]
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people: NLL per answer token, and how much of it is the text's content."""
    lines = [
        "| recipe | seed | minutes | reader | " + " | ".join(METHODS) + " | latent - shuffled |",
        "|---|---:|---:|---|" + "---:|" * (len(METHODS) + 1),
    ]
    for row in rows:
        for reader, nll in row["nll"].items():
            means = " | ".join(f"{nll[way]['mean']:.2f}" for way in METHODS)
            less = row["latent_minus"][reader]["shuffled_latent"]["nll_per_token"]
            lines.append(
                f"| {row['recipe']} | {row['seed']} | {row['seconds'] / 60:.1f} | {reader} | "
                f"{means} | {less['mean']:.2f} [{less['low']:.2f}, {less['high']:.2f}] |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what cannot be run."""
    args = parse(arguments)
    quiet_libraries()
    rows: list[dict[str, Any]] = []
    try:
        for seed in args.seeds:
            for recipe in args.recipes:
                rows.append(run(recipe, seed=seed, args=args))
                (args.out / "recipes.json").write_text(json.dumps(rows, indent=2) + "\n")
                print(table(rows), flush=True)
    except LatentWireError as error:
        print(f"recipes: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
