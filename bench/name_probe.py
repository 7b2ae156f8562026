"""Which half of a person's name a run's latents hold: a probe on the testbed.

    python -m bench.name_probe runs/context runs/one

The testbed's `llama` tells persons apart by the first syllable of a name, `qwen` by the second. For
every fact of a passage, a network with one hidden layer reads the first and the last latent that
stand in the fact's sentence, and names the syllable. It is trained on passages of training names,
and scored on held-out names, which are made of the same syllables. Chance is one in 64.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.command_line import add_json, parser_of, write_json
from latentwire_fast.cli import quiet_libraries
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.data.sources import heldout_examples
from latentwire_fast.data.streams import TestbedStream
from latentwire_fast.data.testbed import SYLLABLES
from latentwire_fast.errors import ConfigError, LatentWireError
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import encoded_text

BATCH = 50  # passages that are encoded at once
HIDDEN, STEPS, ROWS, LEARNING_RATE = 256, 400, 512, 1e-2  # of the probe and its training
TRAINING_SEED = 77  # of passages that the runs were not trained on in this order

_ANY = "|".join(SYLLABLES)
NAME = re.compile(rf"\b({_ANY})({_ANY})\b", re.IGNORECASE)
SENTENCE = re.compile(r"[^.]+\.")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("name_probe")
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs with pooler 'selected'")
    parser.add_argument("--passages", type=int, default=1000, help="to train the probe on")
    parser.add_argument("--examples", type=int, default=300, help="held-out examples")
    add_json(parser)
    return parser.parse_args(arguments)


@torch.no_grad()
def facts(encoder: Encoder, contexts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Of every fact whose sentence has a latent: two latents, side by side `[N, 2 d_z]`, and the
    numbers of the name's two syllables `[N, 2]`."""
    rows, syllables = [], []
    for start in range(0, len(contexts), BATCH):
        batch = contexts[start : start + BATCH]
        latent_BMd, selection = encoder.select(batch)
        for latent_Md, places_M, context in zip(
            latent_BMd, selection.places_BM.tolist(), batch, strict=True
        ):
            ends = [encoder.text_ends(context)[place] for place in places_M]
            for sentence in SENTENCE.finditer(encoded_text(context, None)):
                inside = [
                    m for m, end in enumerate(ends) if sentence.start() < end <= sentence.end()
                ]
                name = NAME.search(sentence.group())  # the person comes before any other name
                if inside and name:
                    rows.append(latent_Md[[inside[0], inside[-1]]].flatten())
                    syllables.append([SYLLABLES.index(half.lower()) for half in name.groups()])
    if not rows:
        raise ConfigError("no latent stands in a sentence with a name; give a run of the testbed")
    return torch.stack(rows).float(), torch.tensor(syllables)


def probe(trained: tuple[Tensor, Tensor], scored: tuple[Tensor, Tensor]) -> float:
    """Percent of the scored labels that a network names that was trained on the others."""
    rows_ND, labels_N = trained
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(rows_ND.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, len(SYLLABLES))
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        index = torch.randint(len(labels_N), (ROWS,))
        loss = nn.functional.cross_entropy(network(rows_ND[index]), labels_N[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = network(scored[0]).argmax(1) == scored[1]
    return 100 * found.float().mean().item()


def measure_run(run: Path, *, passages: int, examples: int) -> dict[str, float]:
    """Percent of held-out names whose first and second syllable the probe finds.

    Raises:
        ConfigError: no run of context mode on the testbed, or an encoder that selects no positions.
    """
    config = read_run_config(run)
    if config.mode != "context" or config.data.source != "testbed":
        raise ConfigError(f"{run} is no run of context mode on the testbed; give one")
    encoder = Interlingua.from_pretrained(RunFolder(run).model).encoder
    stream = TestbedStream(config.data, mode=config.mode, seed=TRAINING_SEED)
    training = [item.context for item in stream.batch(0, passages, facts=config.data.facts)]
    heldout = [
        example.context for example in heldout_examples(config.data, count=examples, seed=None)
    ]
    trained, scored = facts(encoder, training), facts(encoder, heldout)
    return {
        half: probe((trained[0], trained[1][:, i]), (scored[0], scored[1][:, i]))
        for i, half in enumerate(("first", "second"))
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each run. Exit status: 0; 2 for what cannot be measured."""
    args = parse(arguments)
    quiet_libraries()
    found = {}
    try:
        for run in args.runs:
            row = measure_run(run, passages=args.passages, examples=args.examples)
            print(f"{run}: first syllable {row['first']:.1f}%, second {row['second']:.1f}%")
            found[str(run)] = row
    except LatentWireError as error:
        print(f"name_probe: error: {error}", file=sys.stderr)
        return 2
    write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
