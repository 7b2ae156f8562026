"""How loud a prefix should be: NLL behind soft tokens of 0.1 to 100 times the embeddings.

    python -m bench.real.gain_ablation testbed:llama --json gain.json
    python -m bench.real.gain_ablation package:smollm2 --data squad.json --texts 4 --steps 60

A 2026 paper finds that frozen readers want prefixes whose norm is about 100 times that of their
embeddings. For one reader and a few contexts, without an encoder: free soft tokens `[M, D]` of each
context are fitted to its questions and answers, as far as so many Adam steps take them.

* *scaled*: fitted at gain 1, then read at each gain;
* *learned*: fitted at each gain, from the same start with the same steps. A gain g multiplies
  tokens whose own RMS is kept at that of the embeddings, so the optimiser sees the same problem.

Shapes: M soft tokens, D the reader's width.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.cli import quiet_libraries
from latentwire_fast.config.schema import DataConfig
from latentwire_fast.data.sources import load_examples
from latentwire_fast.data.streams import ExampleStream, TrainItem
from latentwire_fast.data.testbed import make_passage
from latentwire_fast.errors import DataError, LatentWireError
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import Reader

GAINS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gain_ablation", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("reader", help="a reader's source")
    add("--data", help="a SQuAD file; passages of the testbed if not given")
    add("--texts", type=int, default=4, help="contexts")
    add("--latents", type=int, default=16, help="M")
    add("--steps", type=int, default=60, help="Adam steps on each")
    add("--lr", type=float, default=0.05, help="relative to the embeddings' RMS")
    add("--gains", type=float, nargs="+", default=list(GAINS))
    add("--max-tokens", type=int, default=160, help="of a context")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the numbers here too")
    return parser.parse_args(arguments)


def passages(reader: Reader, args: argparse.Namespace) -> list[TrainItem]:
    """Contexts with at least four questions.

    Raises:
        DataError: too few of them.
    """
    items = _squad_items(args) if args.data else _testbed_items(args)
    found = [
        item
        for item in items
        if len(item.turns) >= 4 and len(reader.prompts.text_ids(item.context)) <= args.max_tokens
    ]
    if len(found) < args.texts:
        raise DataError(f"{len(found)} contexts with four questions, {args.texts} asked for")
    return found[: args.texts]


def _squad_items(args: argparse.Namespace) -> list[TrainItem]:
    data = DataConfig(args.data, questions_per_context=8)
    examples = load_examples(args.data, split="all", count=None, seed=args.seed)
    return ExampleStream(examples, data, mode="context", seed=args.seed).items


def _testbed_items(args: argparse.Namespace) -> list[TrainItem]:
    rng = random.Random(args.seed)
    made = (make_passage(rng, facts=6, split="heldout") for _ in range(args.texts))
    return [
        TrainItem("testbed", p.context, tuple(Turn(q, a) for q, a in p.questions)) for p in made
    ]


def ablate(reader: Reader, args: argparse.Namespace) -> dict[str, Any]:
    """NLL per answer token, means over the contexts.

    Returns:
        `text` and `nothing` (nothing: no context); `scaled` and `learned` by gain.
    """
    chosen = passages(reader, args)
    scaled: dict[float, list[float]] = {gain: [] for gain in args.gains}
    learned: dict[float, list[float]] = {gain: [] for gain in args.gains}
    text, nothing = [], []
    for passage in chosen:
        text.append(_plain(reader, passage, passage.context))
        nothing.append(_plain(reader, passage, None))
        at_one = learn(reader, passage, gain=1.0, args=args)
        for gain in args.gains:
            scaled[gain].append(_nll(reader, passage, gain * at_one).item())
            own = at_one if gain == 1 else learn(reader, passage, gain=gain, args=args)
            learned[gain].append(_nll(reader, passage, gain * own).item())
            print(f"  gain {gain:g}: {scaled[gain][-1]:.3f}, {learned[gain][-1]:.3f}", flush=True)
    return {
        "reader": args.reader,
        "contexts": len(chosen),
        "latents": args.latents,
        "steps": args.steps,
        "lr": args.lr,
        "seed": args.seed,
        "embedding_rms": reader.embedding_rms,
        "text": _mean(text),
        "nothing": _mean(nothing),
        "scaled": {f"{gain:g}": _mean(values) for gain, values in scaled.items()},
        "learned": {f"{gain:g}": _mean(values) for gain, values in learned.items()},
    }


def learn(reader: Reader, passage: TrainItem, *, gain: float, args: argparse.Namespace) -> Tensor:
    """Soft tokens `[M, D]` of the embeddings' RMS, learned behind a factor `gain`."""
    generator = torch.Generator().manual_seed(args.seed)
    start_MD = torch.randn(args.latents, reader.d_model, generator=generator)
    free_MD = (reader.embedding_rms * start_MD).to(reader.device).requires_grad_()
    optimizer = torch.optim.Adam([free_MD], lr=args.lr * reader.embedding_rms)
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss = _nll(reader, passage, gain * _loud(free_MD, reader))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _loud(free_MD.detach(), reader)


def _loud(tokens_MD: Tensor, reader: Reader) -> Tensor:
    """The tokens with the RMS of the reader's embeddings, each."""
    rms_M1 = tokens_MD.pow(2).mean(-1, keepdim=True).sqrt()
    return tokens_MD * (reader.embedding_rms / rms_M1)


def _nll(reader: Reader, passage: TrainItem, prefix_MD: Tensor) -> Tensor:
    """NLL per token of the answers, each question asked by itself behind the prefix."""
    prompts = reader.prompts.build_many(passage.turns, latent="context")
    prefixes = [prefix_MD] * len(prompts)
    return -reader.score(prompts, prefixes=prefixes).gold_N.mean()


@torch.no_grad()
def _plain(reader: Reader, passage: TrainItem, context: str | None) -> float:
    contexts = [context] * len(passage.turns)
    prompts = reader.prompts.build_many(passage.turns, contexts=contexts)
    return -reader.score(prompts).gold_N.mean().item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['reader']}: {result['contexts']} contexts, M = {result['latents']}, "
        f"{result['steps']} steps; text {result['text']:.3f}, nothing {result['nothing']:.3f}",
        "| gain | scaled | learned |",
        "|---:|---:|---:|",
    ]
    pairs = zip(result["scaled"].items(), result["learned"].values(), strict=True)
    return "\n".join([*lines, *(f"| {g} | {s:.3f} | {own:.3f} |" for (g, s), own in pairs)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for a reader or data that cannot be read."""
    args = parse(arguments)
    quiet_libraries()
    try:
        reader = Reader.load(args.reader, name="reader")
        result = ablate(reader, args)
    except LatentWireError as error:
        print(f"gain_ablation: error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
