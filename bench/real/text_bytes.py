"""How many bytes the texts of a run take in each form: compressed, and coded by its readers.

    python -m bench.real.text_bytes runs/real --texts 200

An evaluation says the same (`bytes` and `coded_text` in metrics.json) of the texts that it scores.
This needs no trained model, only the run's `config.json`, and reads nothing but the texts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench.command_line import add_json, parser_of, write_json
from latentwire_fast.cli import quiet_libraries
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.data.sources import heldout_examples
from latentwire_fast.errors import LatentWireError
from latentwire_fast.evaluation.pipeline import dictionary_texts
from latentwire_fast.evaluation.text_coder import TextCoder
from latentwire_fast.evaluation.text_compression import TextSizes
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.readers.context_limit import ContextLimit
from latentwire_fast.readers.reader import Reader, load_readers

AT_ONCE = 8  # texts between two lines of progress


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("text_bytes")
    add = parser.add_argument
    add("run", type=Path, help="a run folder; its config.json is enough")
    add("--texts", type=int, default=200, help="different held-out texts")
    add("--sample", type=int, default=2, help="texts that are really coded, and decoded again")
    add("--data", help="what to take the training texts of the dictionary from, not the run's")
    add("--eval-data", help="what to take the texts from, in the place of the run's")
    add_json(parser)
    return parser.parse_args(arguments)


def coded(reader: Reader, texts: Sequence[str], *, mode: Any, sample: int) -> dict[str, Any]:
    """The texts under one reader: bytes, and of a few the real length and the seconds of a way."""
    coder = TextCoder(reader, mode=mode)
    rows = coder.ids(texts)
    bits: list[float] = []
    for start in range(0, len(rows), AT_ONCE):
        bits += coder.bits(rows[start : start + AT_ONCE])
        size = sum(bits) / 8 / len(bits)
        print(f"{reader.name}: {len(bits)} of {len(rows)} texts, {size:.1f} bytes", file=sys.stderr)
    lengths, equal, start_time = [], 0, time.perf_counter()
    for ids in rows[:sample]:
        message = coder.encode(ids)
        lengths.append(len(message))
        equal += coder.decode(message) == ids
    return {
        "bytes_mean": sum(bits) / 8 / len(bits),
        "tokens_mean": mean(map(len, rows)),
        "lost": sum(coder.text(ids) != text for ids, text in zip(rows, texts, strict=True)),
        "sample_bytes": lengths,
        "sample_information": [found / 8 for found in bits[:sample]],
        "sample_equal": equal,
        "sample_seconds": time.perf_counter() - start_time,
    }


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON.

    Raises:
        ConfigError, DataError: no such run, or texts that cannot be read.
    """
    config = read_run_config(args.run)
    data = config.data
    if args.data or args.eval_data:
        data = replace(
            data,
            source=args.data or data.source,
            eval_source=args.eval_data or data.eval_source,
        )
        config = replace(config, data=data)
    readers = load_readers(config.readers)
    limit = ContextLimit(readers, data.max_context_tokens)
    found: dict[str, str] = {}
    for example in heldout_examples(data, count=20 * args.texts, keep=limit.fits):
        text = replaced_text(example.context, example.question, mode=config.mode)
        found.setdefault(example.context, text)
    texts = [*found.values()][: args.texts]
    sizes = TextSizes.of(texts, training_texts=dictionary_texts(config))
    forms = {
        name: mean(values)
        for name, values in vars(sizes).items()
        if isinstance(values, list) and values
    }
    return {
        "texts": len(texts),
        "bytes_mean": forms,
        "dictionary": sizes.dictionary,
        "not_measured": sizes.not_measured,
        "readers": {
            name: coded(reader, texts, mode=config.mode, sample=args.sample)
            for name, reader in readers.items()
        },
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A table for the terminal."""
    forms = dict(found["bytes_mean"])
    forms |= {f"coded by {name}": entry["bytes_mean"] for name, entry in found["readers"].items()}
    utf8 = forms["utf8"]
    table = [f"{found['texts']} texts", f"{'form':24}{'bytes':>10}{'bits per byte':>16}"]
    table += [f"{form:24}{size:10.1f}{8 * size / utf8:16.3f}" for form, size in forms.items()]
    for name, entry in found["readers"].items():
        table.append(
            f"{name}: {entry['tokens_mean']:.1f} tokens a text; {entry['lost']} texts not given "
            f"back; really coded: {entry['sample_bytes']} bytes, {entry['sample_equal']} equal"
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what cannot be read."""
    args = parse(arguments)
    quiet_libraries()
    try:
        found = measure(args)
    except LatentWireError as error:
        print(f"text_bytes: error: {error}", file=sys.stderr)
        return 2
    write_json(found, args.json)
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
