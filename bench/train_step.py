"""The time of a training step by part: encoder, readers, backward, optimiser, data, logging.

    python bench/train_step.py testbed --steps 20
    python bench/train_step.py testbed_context --stage quantized --threads 1 --json step.json
    python bench/train_step.py my_run.json --steps 5 --batches 2        # with frozen work kept
    python bench/train_step.py my_run.json --steps 5 --no-cache         # and without

The step is the trainer's own, in a run that ends after a few steps and is then removed: the clock
(`step_clock.py`) listens to the modules and optimisers of that run. The table holds the median over
the steps of one stage, by default the preset's longest. A GPU is waited for at every change of
part, so the parts of a step there add up to more than an undisturbed step.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# This folder, which Python put there, holds others named like packages (`kernels`).
sys.path[0] = str(ROOT)

from bench.command_line import add_json, parser_of, write_json  # noqa: E402


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("train_step")
    add = parser.add_argument
    add("preset", help="a preset, or a configuration in a .json file")
    add("--stage", help="of the preset; the longest if not given")
    add("--steps", type=int, default=20, help="steps that are measured")
    add("--warmup", type=int, default=3, help="steps of the stage before them")
    add("--batches", type=int, help="only so many different batches; frozen work is then kept soon")
    add("--no-cache", action="store_true", help="keep no frozen models' work")
    add("--threads", type=int, help="of torch on a CPU; the preset's own if not given")
    add_json(parser)
    return parser.parse_args(arguments)


def measure(
    preset: str,
    *,
    stage: str | None,
    steps: int,
    warmup: int,
    threads: int | None,
    batches: int | None = None,
    cache: bool = True,
) -> dict[str, Any]:
    """Train for `warmup + steps` steps of one stage and one step of each other stage.

    Returns:
        The setting (preset, stage, threads, device, load), `peak_bytes` of memory (of the GPU's, or
        on a CPU of the process, everything in it), and `parts`: milliseconds and share of a step by
        part, the largest first.

    Raises:
        ConfigError: no such preset or stage.
    """
    import torch

    from bench.step_clock import TimedTrainer
    from latentwire_fast.config.presets import load_preset

    config = load_preset(preset)
    name = stage or max(config.stages, key=lambda part: part.steps).name
    config = shortened(config, stage=name, steps=warmup + steps)
    if threads is not None:
        config = replace(config, threads=threads)
    with tempfile.TemporaryDirectory(prefix="train_step.") as folder:
        trainer = TimedTrainer(
            config, Path(folder) / "run", progress=False, cache=cache, batches=batches
        )
        trainer.run()
    return {
        "preset": preset,
        "stage": name,
        "steps": steps,
        "batch_size": config.optim.batch_size,
        "device": str(trainer.accelerator.device),
        "threads": torch.get_num_threads(),
        "cache": cache,
        "peak_bytes": peak_bytes(),
        "load": round(os.getloadavg()[0], 2),
        "parts": trainer.clock.medians(name, skip=warmup, log_every=config.log_every),
    }


def peak_bytes() -> int:
    """Most memory so far: that of tensors on a GPU, else that of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def shortened(config: Any, *, stage: str, steps: int) -> Any:
    """The run with `steps` steps of one stage and one of each other, and no checkpoint between.

    Raises:
        ConfigError: the run has no such stage.
    """
    from latentwire_fast.errors import ConfigError

    names = [part.name for part in config.stages]
    if stage not in names:
        raise ConfigError(f"{config.preset} has no stage {stage!r}; its stages are {names}")
    stages = tuple(
        replace(part, steps=steps if part.name == stage else 1) for part in config.stages
    )
    return replace(config, stages=stages, save_every=steps + len(stages))


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['preset']}, stage {result['stage']}: batch {result['batch_size']}, "
        f"{result['device']}, {result['threads']} threads, load {result['load']}, "
        f"median of {result['steps']} steps; peak memory {result['peak_bytes'] / 2**30:.2f} GiB"
        + ("" if result["cache"] else "; nothing kept"),
        f"{'part':<28}{'ms':>10}{'share':>8}",
    ]
    parts = result["parts"]
    lines += [f"{name:<28}{p['ms']:>10.1f}{p['share']:>8.1%}" for name, p in parts.items()]
    total = sum(part["ms"] for part in parts.values())
    last = f"{'all':<28}{total:>10.1f}{1:>8.1%}   {1e3 / total:.2f} steps/s"
    return "\n".join([*lines, last])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    from latentwire_fast.cli import quiet_libraries

    args = parse(arguments)
    quiet_libraries()
    result = measure(
        args.preset,
        stage=args.stage,
        steps=args.steps,
        warmup=args.warmup,
        threads=args.threads,
        batches=args.batches,
        cache=not args.no_cache,
    )
    print(table(result))
    write_json(result, args.json)


if __name__ == "__main__":
    main()
