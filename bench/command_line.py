"""What command lines of benchmarks have in common: defaults in their help, numbers in a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def parser_of(program: str) -> argparse.ArgumentParser:
    """An empty command line. (argparse: a GPU machine has none of our other libraries.)"""
    return argparse.ArgumentParser(
        prog=program, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`, for `write_json`."""
    parser.add_argument("--json", type=Path, help="write the numbers here too")


def write_json(result: Any, path: Path | None) -> None:
    """Write the numbers to the file of `--json`, if one was given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
