"""What a reader makes of its own keys and values in a deep prefix: the ceilings of training one.

    python bench/prefix_ceilings.py FOLDER_OF_A_READER FILE_IN_SQUADS_FORMAT --contexts 10

NLL per answer token (nats) of two questions on each context, with the text; without it; with all of
the text's own keys and values in the text's place, and before the whole prompt; and with M of them
(the last of each of M spans, and the means over the spans) in the text's place. Nothing is trained.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# This folder, which Python put there, holds others named like packages (`kernels`).
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from latentwire_fast.data.examples import Example  # noqa: E402
from latentwire_fast.data.sources import load_examples  # noqa: E402
from latentwire_fast.prompts.builder import Turn  # noqa: E402
from latentwire_fast.readers.own_kv import head_keys_values, text_keys_values  # noqa: E402
from latentwire_fast.readers.reader import Reader  # noqa: E402


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prefix_ceilings", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("reader", help="a source, as of --reader of the commands")
    parser.add_argument("data", help="a source, as of --data of the commands")
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--latents", type=int, nargs="+", default=[32, 64], help="M")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@torch.no_grad()
def ceilings(
    reader: Reader, contexts: dict[str, list[Turn]], latents: Sequence[int]
) -> dict[str, float]:
    """NLL per answer token of each way to give the reader a context."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    none = torch.zeros(1, 0, reader.d_model, device=reader.device)
    head = head_keys_values(reader, "context").float()
    first = head.shape[4]

    def count(name: str, gold_N: Tensor) -> None:
        sums[name][0] -= gold_N.sum().item()
        sums[name][1] += len(gold_N)

    for context, turns in contexts.items():
        with_text = reader.prompts.build(turns, context=context)
        prompt = reader.prompts.build(turns, context=context, latent="context")
        without = reader.prompts.build(turns, context=None)
        tokens = len(reader.prompts.build_context(context).ids) - first
        own = text_keys_values(reader, context, slots=tokens, first=first)[:, :, None]
        count("the text", reader.score([with_text]).gold_N)
        count("nothing", reader.score([without]).gold_N)
        placed = torch.cat([head, own], 4)
        count(
            "all, in place", reader.score([prompt], prefixes=none, deep=placed, head=first).gold_N
        )
        count("all, before the prompt", reader.score([prompt], prefixes=none, deep=own).gold_N)
        for m in latents:
            moved = text_keys_values(reader, context, slots=m, first=first)[:, :, None]
            edges = [tokens * i // m for i in range(m + 1)]
            last = moved[..., [max(0, stop - 1) for stop in edges[1:]], :]
            spans = pairwise(edges)
            means = torch.stack([moved[..., a : max(b, a + 1), :].mean(-2) for a, b in spans], -2)
            for name, part in (("last of spans", last), ("means of spans", means)):
                deep = torch.cat([head, part], 4)
                gold_N = reader.score([prompt], prefixes=none, deep=deep, head=first).gold_N
                count(f"{m} positions, {name}", gold_N)
    return {name: total / tokens for name, (total, tokens) in sums.items()}


def sample(examples: Sequence[Example], *, contexts: int, seed: int) -> dict[str, list[Turn]]:
    """Two questions on each of some contexts."""
    turns: dict[str, list[Turn]] = defaultdict(list)
    for example in examples:
        if example.answers:
            turns[example.context].append(Turn(example.question, example.answers[0]))
    rng = random.Random(seed)
    chosen = rng.sample(sorted(turns), min(contexts, len(turns)))
    return {context: rng.sample(turns[context], min(2, len(turns[context]))) for context in chosen}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    args = parse(arguments)
    reader = Reader.load(args.reader, name="reader")
    examples = load_examples(args.data, split="all", count=None, seed=args.seed)
    contexts = sample(examples, contexts=args.contexts, seed=args.seed)
    for name, value in ceilings(reader, contexts, args.latents).items():
        print(f"{name:32s} {value:.3f}")


if __name__ == "__main__":
    main()
