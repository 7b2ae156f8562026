"""What a reader answers from its own keys and values at the positions that it attends to itself.

    python -m bench.own_positions --reader llama=testbed:llama --passages 60 --positions 8 12 16

Objective `own_kv` teaches a deep prefix these keys and values: this says how long a reader needs it
to be. On passages of the built-in task that no training had, all their questions together choose
the positions, and each question is answered from them alone. The table has the same columns as
`bench.chosen_positions`; its positions are those of an encoder.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

import torch

from bench.chosen_positions import Score, read_behind
from bench.command_line import add_json, parser_of, write_json
from latentwire_fast.cli import parse_pairs, quiet_libraries
from latentwire_fast.config.reader import ReaderConfig
from latentwire_fast.data.testbed import Passage, make_passage
from latentwire_fast.errors import LatentWireError
from latentwire_fast.objectives.own_kv import most_attended
from latentwire_fast.prompts.builder import Turn, encoded_text
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.readers.trace import observe

BATCH = 20  # passages that are read at once
SEED = 7


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("own_positions")
    parser.add_argument("--reader", action="append", required=True, help="NAME=SOURCE, repeatable")
    parser.add_argument("--passages", type=int, default=60, help="of four facts each")
    parser.add_argument("--positions", type=int, nargs="+", default=[8, 12, 16], help="how many")
    add_json(parser)
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(
    reader: Reader, passages: Sequence[Passage], counts: Sequence[int]
) -> dict[str, dict[str, float]]:
    """By the way in which the reader is given the passages: `Score.row`."""
    scores = {"the text": Score(), **{f"{count} positions": Score() for count in counts}}
    build, start = reader.prompts.build, reader.prompts.content_start
    for first in range(0, len(passages), BATCH):
        batch = passages[first : first + BATCH]
        asked = [[Turn(*question) for question in passage.questions] for passage in batch]
        texts = [build(turns, context=p.context) for p, turns in zip(batch, asked, strict=True)]
        attention_BT = observe(reader, texts).attention_BT[:, start:]
        ends = [len(reader.prompts.text_ends(encoded_text(p.context, None))) for p in batch]
        held = observe(reader, [reader.prompts.build_context(p.context) for p in batch])
        deep = {}
        for count in counts:
            rows = [
                most_attended(row[:end], count) for row, end in zip(attention_BT, ends, strict=True)
            ]
            deep[count] = held.keys_values(start + torch.stack(rows))
        for turns in zip(*asked, strict=True):
            pairs = list(zip(batch, turns, strict=True))
            with_text = [build([turn], context=p.context) for p, turn in pairs]
            scores["the text"].add(reader.score(with_text))
            prompts = [build([turn], context=p.context, latent="context") for p, turn in pairs]
            for count in counts:
                scores[f"{count} positions"].add(read_behind(reader, prompts, deep[count]))
    return {name: score.row() for name, score in scores.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table. Exit status: 0; 2 for what cannot be measured."""
    args = parse(arguments)
    quiet_libraries()
    rng = random.Random(SEED)
    passages = [make_passage(rng, facts=4, split="heldout") for _ in range(args.passages)]
    try:
        sources = parse_pairs(args.reader, option="--reader")
        chosen = {name: ReaderConfig(source) for name, source in sources.items()}
        readers = load_readers(chosen, torch.device("cpu"))
        found = {name: measure(r, passages, args.positions) for name, r in readers.items()}
    except LatentWireError as error:
        print(f"own_positions: error: {error}", file=sys.stderr)
        return 2
    for name, ways in found.items():
        for way, row in ways.items():
            print(f"{name:8s} {way:14s}", *(f"{key} {value:.3f}" for key, value in row.items()))
    write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
