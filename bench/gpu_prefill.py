"""The prefill engine on one GPU: its tests, and the tables of an 8B and a 7B reader, in 9 minutes.

    python bench/gpu_prefill.py OUT           # OUT/tables, OUT/compile, OUT/two_devices, OUT/tests
    python bench/gpu_prefill.py OUT --tiny    # the same path on a CPU: tests it, measures nothing

Runs from a checkout that need not be installed, on torch, triton, transformers and numpy (pytest
for the tests, accelerate for two devices, matplotlib for the figure, where they are there). Every
section is a process of its own with a time limit, and writes what it has after every group of rows.
`compile` is one batch and length only: a backbone of 32 layers compiles for most of a minute per
shape, and where the arithmetic decides there is nothing in it.

Exit status: 0; 1 where a section failed; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import OK, ROOT, finish, start

TOTAL_SECONDS = 525
# A section gets this much to import torch and to end, besides its budget.
MARGIN_SECONDS = 25
LATENCY = ROOT / "bench" / "prefill_latency.py"


@dataclass(frozen=True)
class Section:
    """One process: options of `prefill_latency.py`, and the seconds that it may take in all."""

    name: str
    seconds: int
    options: str


SECTIONS = (
    Section("tables", 330, "--readers llama-3.1-8b qwen2.5-7b --engines eager graph"),
    Section(
        "compile",
        100,
        "--readers llama-3.1-8b --engines eager compile --batches 1 --text-tokens 250 --latents 32 "
        "--methods text latent_cached",
    ),
    Section(
        "two_devices",
        35,
        "--readers llama-160m --half-on-cpu --batches 1 --text-tokens 250 --latents 32 "
        "--methods text latent_cached deep_prefix --warm-ups 3 --repeats 20",
    ),
)
TINY = (
    "--readers llama-tiny --encoder llama-tiny --device cpu --engines eager --batches 1 "
    "--text-tokens 40 --latents 4 --warm-ups 1 --repeats 5"
)
TESTS_SECONDS = 60


def tests(folder: Path, seconds: float) -> str:
    """The engine's tests on the GPU, those with the kernels as well."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "tests/test_prefill.py", "tests/test_kernels_prefill.py"]
    log = folder / "tests.log"
    outcome = finish(start(command, log), by=time.monotonic() + seconds)
    print(log.read_text(errors="replace")[-2000:])
    return outcome


def latency(section: Section, folder: Path, seconds: float) -> str:
    """One run of the benchmark."""
    budget = max(seconds - MARGIN_SECONDS, 5)
    command = [sys.executable, str(LATENCY), *section.options.split()]
    command += ["--out", str(folder / section.name), "--budget", str(budget)]
    return finish(start(command), by=time.monotonic() + seconds)


def run_all(folder: Path, sections: Sequence[Section], *, seconds: float, tiny: bool) -> int:
    """Every section in turn; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes = {} if tiny else {"tests": tests(folder, TESTS_SECONDS)}
    for section in sections:
        limit = min(section.seconds, deadline - time.monotonic())
        print(f"== {section.name}: at most {limit:.0f} s", flush=True)
        late = limit < MARGIN_SECONDS
        outcome = "not run: out of time" if late else latency(section, folder, limit)
        outcomes[section.name] = outcome
    lines = "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items())
    print(lines)
    (folder / "sections.txt").write_text(lines + "\n")
    return int(any(outcome != OK for outcome in outcomes.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for everything that is found")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at shapes that mean nothing")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of the whole run")
    options = parser.parse_args(arguments)
    import torch

    if not (torch.cuda.is_available() or options.tiny):
        print("gpu_prefill.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    sections = [Section("tables", 120, TINY)] if options.tiny else SECTIONS
    return run_all(options.folder, sections, seconds=options.seconds, tiny=options.tiny)


if __name__ == "__main__":
    sys.exit(main())
