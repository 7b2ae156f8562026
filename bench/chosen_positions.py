"""What a reader answers from its own keys and values at the positions that a run's encoder chose.

    python -m bench.chosen_positions runs/context --examples 500 --positions 8 12 16

Objective `kv` teaches a deep prefix these keys and values, so this is what it can reach. For each
reader: the share of held-out answers of which every token is the reader's first choice (with the
tokens before it given), and the NLL per token. With the text; with the keys and values at the best
positions, before the whole prompt (as the attachment `deep` puts them) and in the text's place (as
with `in_place`). The run's own latents are not read, and nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.command_line import add_json, parser_of, write_json
from latentwire_fast.cli import parse_pairs, quiet_libraries
from latentwire_fast.config.reader import ReaderConfig
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import heldout_examples
from latentwire_fast.errors import ConfigError, LatentWireError
from latentwire_fast.evaluation.methods.base import turns
from latentwire_fast.evaluation.scoring import batches
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.selected import best_places
from latentwire_fast.objectives.token_alignment import move_places
from latentwire_fast.prompts.builder import Prompt, encoded_text
from latentwire_fast.readers.own_kv import head_keys_values
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.readers.trace import observe

BATCH = 25  # examples that are read at once


@dataclass
class Score:
    """Sums over answers.

    Attributes:
        right: per answer, whether all its tokens are the first choice.
        nll: of all tokens, nats.
        tokens: how many.
    """

    right: list[bool] = field(default_factory=list)
    nll: float = 0.0
    tokens: int = 0

    def add(self, scores: TargetScores) -> None:
        """Count a batch."""
        best_N = scores.ranked_NK(1)[:, 0].cpu() == scores.labels_N.cpu()
        self.right += [
            bool(best_N[scores.rows_N.cpu() == row].all()) for row in range(scores.prompts)
        ]
        self.nll -= scores.gold_N.sum().item()
        self.tokens += len(scores.gold_N)

    def row(self) -> dict[str, float]:
        """Percent of answers, and NLL per token."""
        return {
            "answers right": 100 * sum(self.right) / len(self.right),
            "NLL per token": self.nll / self.tokens,
        }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("chosen_positions")
    parser.add_argument("run", type=Path, help="a finished run with encoder pooler 'selected'")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--positions", type=int, nargs="+", default=[8, 12], help="how many")
    parser.add_argument(
        "--reader",
        action="append",
        default=[],
        help="NAME=SOURCE in the place of the run's readers, repeatable: one that it has not seen",
    )
    add_json(parser)
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(
    encoder: Encoder, reader: Reader, examples: Sequence[Example], counts: Sequence[int]
) -> dict[str, dict[str, float]]:
    """By the way in which the reader is given the texts: `Score.row`."""
    scores = {"the text": Score()}
    scores |= {name: Score() for count in counts for name in _names(count)}
    head = head_keys_values(reader, "context").float()
    for rows in batches(len(examples), BATCH):
        batch = [examples[i] for i in rows]
        build = reader.prompts.build
        with_text = [build(turns(e), context=e.context) for e in batch]
        prompts = [build(turns(e), context=e.context, latent="context") for e in batch]
        scores["the text"].add(reader.score(with_text))
        observation = observe(reader, [reader.prompts.build_context(e.context) for e in batch])
        for count in counts:
            places_BM = _places(encoder, reader, batch, count)
            before, in_place = _names(count)
            deep = observation.keys_values(places_BM)
            scores[before].add(read_behind(reader, prompts, deep, head=0))
            moved = observation.keys_values(places_BM, first=head.shape[4])
            deep = torch.cat([head.expand(-1, -1, len(batch), -1, -1, -1), moved], 4)
            scores[in_place].add(read_behind(reader, prompts, deep, head=head.shape[4]))
    return {name: score.row() for name, score in scores.items()}


def _names(count: int) -> tuple[str, str]:
    return f"{count} positions, before the prompt", f"{count} positions, in the text's place"


def _places(encoder: Encoder, reader: Reader, batch: Sequence[Example], count: int) -> Tensor:
    """The reader's positions `[B, count]` of what the encoder scores highest."""
    contexts = [example.context for example in batch]
    _, selection = encoder.select(contexts)
    ends = [
        (encoder.text_ends(text, None), reader.prompts.text_ends(encoded_text(text, None)))
        for text in contexts
    ]
    places_BM = move_places(best_places(selection.scores_BT, count), ends)
    return reader.prompts.content_start + places_BM


def read_behind(
    reader: Reader, prompts: Sequence[Prompt], deep: Tensor, *, head: int = 0
) -> TargetScores:
    """Scores of the prompts' answers behind keys and values, which hold `head` of their ids."""
    none = torch.zeros(len(prompts), 0, reader.d_model, device=reader.device)
    return reader.score(prompts, prefixes=none, deep=deep, head=head)


def measure_run(
    run: Path, *, examples: int, positions: Sequence[int], sources: Mapping[str, str] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """By reader: `measure`.

    Args:
        sources: readers by name, in the place of the run's.

    Raises:
        ConfigError: no run of context mode, or an encoder that selects no positions.
    """
    config = read_run_config(run)
    if config.mode != "context":
        raise ConfigError(f"{run} is of {config.mode} mode; give a run of context mode")
    model = Interlingua.from_pretrained(RunFolder(run).model)
    heldout = heldout_examples(config.data, count=examples, seed=None)
    chosen = {name: ReaderConfig(source) for name, source in (sources or {}).items()}
    readers = load_readers(chosen or config.readers, torch.device("cpu"))
    return {
        name: measure(model.encoder, reader, heldout, positions) for name, reader in readers.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table. Exit status: 0; 2 for what cannot be measured."""
    args = parse(arguments)
    quiet_libraries()
    try:
        sources = parse_pairs(args.reader, option="--reader")
        found = measure_run(
            args.run, examples=args.examples, positions=args.positions, sources=sources
        )
    except LatentWireError as error:
        print(f"chosen_positions: error: {error}", file=sys.stderr)
        return 2
    for name, ways in found.items():
        for way, row in ways.items():
            print(f"{name:8s} {way:38s}", *(f"{key} {value:.3f}" for key, value in row.items()))
    write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
