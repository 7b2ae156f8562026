"""`squad_small` on a GPU machine without a network: everything it needs as files, then the run.

    python -m bench.real.gpu_real pack FILES --data SPEC --eval-data SPEC    # with a network
    python -m bench.real.gpu_real run FILES OUT                              # with a GPU

`pack` writes the readers' GGUF files in parts of at most 60 MB, the data, and wheels of what a
machine with torch, transformers and accelerate may lack. `run` puts the weights together, trains
for at most so many minutes, evaluates, and leaves OUT/all.tar.gz: report, metrics, predictions and
diagnostics. Bring the folder FILES, file by file if need be. `run` again resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.processes import ROOT, environment
from bench.real.file_parts import PartsError, join, split
from bench.wheels import install

READERS = {"smollm2": "package:smollm2", "gemma3": "package:gemma3"}
# With their pins from constraints.txt. Others that we import are where torch's own tools are.
WHEELS = ("tyro", "docstring-parser", "typeguard", "brotli", "gguf", "rouge-score", "nltk")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MINUTES = 25.0
KEPT = ("config.json", "diagnostics.jsonl", "eval")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_real", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pack_files = commands.add_parser("pack", help="write all files that the run needs into FILES")
    pack_files.add_argument("files", type=Path)
    pack_files.add_argument("--data", required=True, help="as of the training command")
    pack_files.add_argument("--eval-data", required=True, help="as of the training command")
    pack_files.add_argument("--continuation", help="text=FILE: running text to be scored on")
    pack_files.add_argument("--python", default="3.12", help="of the GPU machine")
    pack_files.add_argument("--no-wheels", action="store_true", help="it has all packages")
    start = commands.add_parser("run", help="train and evaluate, on the GPU machine")
    start.add_argument("files", type=Path)
    start.add_argument("out", type=Path)
    start.add_argument("--minutes", type=float, default=MINUTES, help="of training at most")
    start.add_argument("--preset", default="squad_small")
    start.add_argument("--device", default="cuda")
    start.add_argument("--rest", nargs=argparse.REMAINDER, default=[], help="to the training")
    return parser.parse_args(arguments)


# --- with a network -------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Write weights, data and wheels."""
    from latentwire_fast.data.source_names import map_paths
    from latentwire_fast.readers.sources.packages import package_file

    files: Path = args.files
    for folder in ("weights", "data", "wheels"):
        (files / folder).mkdir(parents=True, exist_ok=True)

    def brought(path: str) -> str:
        shutil.copyfile(path, files / "data" / Path(path).name)
        return Path(path).name

    sources = {"data": args.data, "eval_data": args.eval_data, "continuation": args.continuation}
    plan: dict[str, Any] = {
        key: map_paths(spec, brought) for key, spec in sources.items() if spec is not None
    }
    plan["readers"] = {
        name: split(package_file(source), files / "weights").name
        for name, source in READERS.items()
    }
    if not args.no_wheels:
        fetch_wheels(files / "wheels", python=args.python)
    (files / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    print(f"{files}: {size / 1e6:.0f} MB; bring it to the GPU machine, then: make gpu-real")


def fetch_wheels(folder: Path, *, python: str) -> None:
    """Wheels of `WHEELS`; those that the registry has no wheel of are built here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    common = ["--no-deps", "-c", str(ROOT / "constraints.txt")]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for name in WHEELS:
        found = subprocess.run(
            [*pip, "download", *common, *target, *platforms, "-d", str(folder), name], check=False
        )
        if found.returncode:
            subprocess.run([*pip, "wheel", *common, "-w", str(folder), name], check=True)


# --- on the GPU machine ---------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Train and evaluate; the training command's exit status."""
    files, out = args.files.resolve(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [install(sorted((files / "wheels").glob("*.whl")), out / "packages")]
    plan = json.loads((files / "plan.json").read_text())
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], *filter(None, paths)])
    env.setdefault("LATENTWIRE_CACHE", str(out / "cache"))
    done = subprocess.run(command(plan, files, out, args), cwd=ROOT, env=env, check=False)
    with tarfile.open(out / "all.tar.gz", "w:gz") as archive:
        for name in KEPT:
            if (out / "run" / name).exists():
                archive.add(out / "run" / name, arcname=name)
    print(f"results: {out / 'all.tar.gz'}")
    return done.returncode


def command(plan: dict[str, Any], files: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The training command, with the weights put together."""
    from latentwire_fast.data.source_names import map_paths

    def here(spec: str) -> str:
        return map_paths(spec, lambda name: str(files / "data" / name))

    words = [sys.executable, "-m", "latentwire_fast.train", args.preset, "--run", str(out / "run")]
    for name, listed in plan["readers"].items():
        whole = out / "weights" / Path(listed).stem
        if not whole.is_file():
            whole = join(files / "weights" / listed, out / "weights")
        words += ["--reader", f"{name}={whole}"]
    words += ["--data", here(plan["data"]), "--eval-data", here(plan["eval_data"])]
    if "continuation" in plan:
        settings = json.dumps({"source": here(plan["continuation"])})
        words += ["--set", f"evaluation.continuation={settings}"]
    words += ["--minutes", str(args.minutes), "--device", args.device]
    return [*words, *args.rest]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 where files are missing; the training's own."""
    from latentwire_fast.errors import LatentWireError

    args = parse(arguments)
    try:
        if args.command == "run":
            return run(args)
        pack(args)
    except (PartsError, LatentWireError, OSError, subprocess.CalledProcessError) as error:
        print(f"gpu_real: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
