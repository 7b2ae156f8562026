"""The prefill engine on one GPU: its tests, and the tables of an 8B and a 7B reader, in 9 minutes.

    python -m bench.prefill.gpu_prefill OUT           # tables, compile, decoding, *.log
    python -m bench.prefill.gpu_prefill OUT --tiny    # on a CPU: tests the path, measures nothing

Runs from a checkout that need not be installed, on torch, triton, transformers and numpy (pytest
for the tests, accelerate for two devices, matplotlib for the figure, and a compiler with cmake and
pybind11 for the extension, where they are there). Every section is a process of its own with a time
limit, and writes what it has after every group of rows; OUT/all.tar.gz holds everything so far.
What a section leaves of its time, the later ones have. `compile` is one batch and length only: a
backbone of 32 layers compiles for a minute or more, and where the arithmetic decides there is
nothing in it.

Exit status: 0; 1 where a section failed; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_tests import PYTEST, report_of
from bench.processes import FAILED, OK, ROOT, build_extension, finish, ready, start

TOTAL_SECONDS = 530
# A section stops starting rows this long before it would be ended: the row that runs, and writing.
# The less where there are few rows, and fast ones.
MARGIN_SECONDS, SHORT_MARGIN_SECONDS = 12, 6
# What a section spends before its first reader: torch and transformers imported, ceilings measured.
IMPORT_SECONDS = 12
LATENCY = ROOT / "bench" / "prefill_latency.py"
TESTS = tuple(
    ROOT / "tests" / f"{name}.py"
    for name in (
        *("serving/test_receiver", "serving/test_stream_order", "kernels/test_kernels_prefill"),
        *("readers/test_kv_cache", "readers/test_kv_placement"),
    )
)
# A section may take that share of the time left which its seconds are of those still to come: what
# one leaves over, the later ones have. tests/bench/test_prefill_rehearsal.py holds all of them.
EXTENSION_SECONDS, TESTS_SECONDS, DECODING_SECONDS = 40, 45, 33
DECODED = "--reader llama-3.1-8b --tokens 1 8 32 --runs 5"


@dataclass(frozen=True)
class Section:
    """One process: options of `prefill_latency.py`, its seconds (see above), and its margin."""

    name: str
    seconds: int
    options: str
    margin: int = MARGIN_SECONDS


# Batches of more than 32,000 tokens of text take seconds each: 4,000 tokens at batch 32 are left to
# the prediction. The sender's rows are there for one batch.
SECTIONS = (
    Section(
        "tables",
        306,
        "--readers llama-3.1-8b qwen2.5-7b --engines eager graph --most-tokens 32000 "
        "--sender-batches 8",
    ),
    Section(
        "two_devices",
        30,
        "--readers llama-160m --half-on-cpu --batches 1 --text-tokens 250 --latents 32 "
        "--methods text latent_cached deep_prefix --warm-ups 3 --repeats 20",
        SHORT_MARGIN_SECONDS,
    ),
    Section(
        "compile",
        76,
        "--readers llama-3.1-8b --engines eager compile --batches 1 --text-tokens 250 --latents 32 "
        "--methods text latent_cached",
        SHORT_MARGIN_SECONDS,
    ),
)
TINY = (
    "--readers llama-tiny --encoder llama-tiny --device cpu --engines eager --batches 1 "
    "--text-tokens 40 --latents 4 --warm-ups 1 --repeats 5"
)


def tests(folder: Path, seconds: float) -> str:
    """The engine's and the placement's tests on the GPU, side by side: compiling kernels takes most
    of their time."""
    by = time.monotonic() + seconds
    logs = [folder / f"{path.stem}.log" for path in TESTS]
    running = [start([*PYTEST, "-m", "gpu", p], log) for p, log in zip(TESTS, logs, strict=True)]
    endings = [finish(process, by=by) for process in running]
    notes = []
    for path, log, ending in zip(TESTS, logs, endings, strict=True):
        report = report_of(path.name, log.read_text(errors="replace"), ending)
        print(f"  {report}")
        notes += [f"{path.name}: {report['note']}"] if report["bad"] else []
    return f"{FAILED}: {'; '.join(notes)}" if notes else OK


def latency(section: Section, folder: Path, seconds: float, commit: str | None) -> str:
    """One run of the benchmark."""
    ends = time.monotonic() + seconds
    command = [sys.executable, str(LATENCY), *section.options.split()]
    command += ["--out", str(folder / section.name), "--until", str(ends - section.margin)]
    command += ["--commit", commit] if commit else []
    return finish(start(command), by=ends)


def decoding(folder: Path, seconds: float) -> str:
    """The time until n tokens are on the host, op by op and with graphs."""
    ends = time.monotonic() + seconds
    program = [sys.executable, "-m", "bench.prefill.time_to_tokens", *DECODED.split()]
    program += ["--json", str(folder / "decoding.json")]
    program += ["--until", str(ends - SHORT_MARGIN_SECONDS)]
    return finish(start(program, folder / "decoding.log"), by=ends)


def pack(folder: Path) -> None:
    """Everything that was found in a folder, as one file in it."""
    archive, temporary = folder / "all.tar.gz", folder / ".all.tmp"
    left_out = archive, temporary, folder / "packages"
    with tarfile.open(temporary, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            if path not in left_out:
                tar.add(path, arcname=path.name)
    temporary.replace(archive)


def works(
    folder: Path, sections: Sequence[Section], *, tiny: bool, commit: str | None
) -> list[tuple[str, int, Callable[[float], str]]]:
    """What a run does, in order: its name, its seconds, and the work."""

    def measured(section: Section) -> tuple[str, int, Callable[[float], str]]:
        work = lambda limit: latency(section, folder, limit, commit)  # noqa: E731
        return section.name, section.seconds, work

    if tiny:
        return [measured(section) for section in sections]
    log = folder / "extension.log"
    return [
        ("extension", EXTENSION_SECONDS, lambda limit: build_extension(log, limit)),
        ("tests", TESTS_SECONDS, lambda limit: tests(folder, limit)),
        *(measured(section) for section in sections[:-1]),
        ("decoding", DECODING_SECONDS, lambda limit: decoding(folder, limit)),
        measured(sections[-1]),
    ]


def run_all(
    folder: Path,
    sections: Sequence[Section],
    *,
    seconds: float,
    tiny: bool,
    commit: str | None = None,
) -> int:
    """Every section in turn; the exit status."""
    folder = folder.resolve()  # the sections run in the root of the checkout
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: dict[str, str] = {}
    to_come = works(folder, sections, tiny=tiny, commit=commit)
    while to_come:
        limit = max(0.0, deadline - time.monotonic()) / sum(share for _, share, _ in to_come)
        name, share, work = to_come.pop(0)
        limit *= share
        print(f"== {name}: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        late = limit < MARGIN_SECONDS
        outcomes[name] = "not run: out of time" if late else work(limit)
        print(f"== {name}: {outcomes[name]}, {time.monotonic() - started:.0f} s", flush=True)
        lines = [f"{name}: {outcome}" for name, outcome in outcomes.items()]
        (folder / "sections.txt").write_text("\n".join(lines) + "\n")
        pack(folder)
    print((folder / "sections.txt").read_text())
    # Placement has a torch path: without the extension the tables are correct, and they say so.
    return int(any(o != OK for name, o in outcomes.items() if name != "extension"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for everything that is found")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at shapes that mean nothing")
    parser.add_argument("--commit", help="of this tree, where git cannot tell")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="a folder of wheels")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of the whole run")
    options = parser.parse_args(arguments)
    packages = options.folder.resolve() / "packages"
    if not ready("gpu_prefill", tiny=options.tiny, wheels=options.wheels, target=packages):
        return 2
    return run_all(
        *(options.folder, [Section("tables", 120, TINY)] if options.tiny else SECTIONS),
        seconds=options.seconds,
        tiny=options.tiny,
        commit=options.commit,
    )


if __name__ == "__main__":
    sys.exit(main())
