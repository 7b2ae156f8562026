"""Train an encoder, and adapters for a set of frozen readers; then evaluate them.

    python -m latentwire_fast.train testbed                                # minutes, two CPU cores
    python -m latentwire_fast.train testbed_context --run runs/context
    python -m latentwire_fast.train testbed --data squad.json \\
        --reader llama=PATH --reader qwen=PATH
    python -m latentwire_fast.train testbed --base runs/demo --reader NAME=PATH    # one more reader
    python -m latentwire_fast.train mine.json --import my_parts    # with parts of your own
    torchrun --nproc-per-node 2 -m -- latentwire_fast.train testbed        # several processes

Run the same command again to resume what was stopped. Of a finished run it prints the results, and
evaluates it only where that has not been done.

From Python: `latentwire_fast.train(config, "runs/mine")`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from latentwire_fast.cli import (
    Assignments,
    Dtype,
    Imports,
    ReaderOptions,
    choose_device,
    make_callable,
    parse_arguments,
    parse_pairs,
    run_entry_point,
)

if TYPE_CHECKING:  # `--help` does without torch
    import torch

    from latentwire_fast.config.schema import RunConfig


@dataclass(frozen=True)
class TrainArguments:
    """Train an encoder, and adapters for a set of frozen readers; then evaluate them.

    Args:
        preset: a preset (testbed, testbed_context, testbed_quick, testbed_byte, testbed_smoke,
            squad_small, squad_llama_qwen) or a .json file.
        run: run folder, runs/PRESET if not given (with --base runs/PRESET_READERS). An unfinished
            run in it is resumed.
        reader: NAME=SOURCE, repeatable: replaces the preset's readers. SOURCE is a local folder, a
            .gguf file, package:NAME (smollm2, gemma3), a hub id or testbed:NAME (llama, qwen).
        encoder: source of the encoder's language model; with --reader, the first reader's source
            unless given.
        data: testbed, a file in SQuAD's format (FILE[A:B]: some of its articles), text=FILE
            (paragraphs without questions), a saved data set, or hub:NAME; several with + between.
        eval_data: what to evaluate on, in the same form; the held-out part of the data unless
            given. No context may be in both.
        base: a finished run to add the readers to. Its encoder stays as it is; the readers learn
            to read its payloads.
        mode: context (the latent stands for the context, the question is text) or pure (the latent
            holds the question too).
        seed: of the first weights and of the order of the data.
        steps: number of steps in all. Every stage becomes shorter or longer in proportion, and has
            one step at least.
        minutes: of training at most; where they are too short for all steps, steps are left out
            evenly.
        batch_size: examples per step.
        eval_examples: held-out examples to evaluate on.
        no_eval: train, and do not evaluate.
        no_cache: of a finite data set, do not keep in the run folder what frozen models compute of
            it, and remove what was kept. The training is slower and its result the same, up to
            the rounding to 16-bit floats.
        dry_run: print what the run takes (parameters, bytes, memory, hours on a GPU), computed from
            the shapes of its models, and do nothing else.
        print_config: print the configuration as JSON, and do nothing else. Such a file can be given
            in the place of a preset.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: of the readers; the preset's own unless given.
        assignments: PATH=VALUE, repeatable: sets any field of the configuration, such as
            stages.answer.steps=10 or encoder.pooler.kind=spans; --print-config shows all. A value
            is JSON, or else text.
        reader_options: NAME.FIELD=VALUE, repeatable: how a reader is loaded. FIELD is dtype,
            load_in_4bit, device_map, max_memory or attn_implementation, as in llama.dtype=bfloat16.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    preset: Annotated[str, tyro.conf.Positional]
    run: Path | None = None
    reader: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    encoder: str | None = None
    data: str | None = None
    eval_data: str | None = None
    base: str | None = None
    mode: Literal["context", "pure"] | None = None
    seed: int | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int | None = None
    eval_examples: int | None = None
    no_eval: tyro.conf.FlagCreatePairsOff[bool] = False
    no_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    device: str | None = None
    dtype: Dtype | None = None
    assignments: Assignments = ()
    reader_options: ReaderOptions = ()
    imports: Imports = ()


def train(
    config: RunConfig,
    run: str | Path,
    *,
    evaluate: bool = True,
    cache: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Train a run, or go on with it where it was stopped, then evaluate it.

    Of a finished run nothing is trained again, and it is evaluated only where that has not been
    done.

    Args:
        run: the run folder; made if missing.
        evaluate: score it on its held-out examples afterwards, and write the report.
        cache: keep in the run folder what frozen models compute of a finite data set; False also
            removes what was kept.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        progress: show progress bars.

    Returns:
        The content of metrics.json; None without an evaluation, and in every process but the first
        where several train together.

    Raises:
        ConfigError, DataError: the configuration cannot work, or the folder holds another run.
        RunStopped: by SIGINT or SIGTERM, and saved; the same call goes on.
        TrainingError, CheckpointError: see `Trainer` and `evaluate_run`.
    """
    from latentwire_fast.data.sources import heldout_examples
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.evaluation.pipeline import evaluate_run, stored_metrics
    from latentwire_fast.training.trainer import Trainer

    folder = Path(run)
    place = choose_device(device, option="device") if isinstance(device, str) else device
    if place and place.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"device {device}: several processes take one device each, by their numbers; "
            f"write {place.type}"
        )
    # An error now, not after the training.
    heldout = heldout_examples(config.data) if evaluate else []
    trainer = Trainer(config, folder, heldout=heldout, progress=progress, cache=cache, device=place)
    was_finished = trainer.finished
    trainer.run()
    leads = trainer.accelerator.is_main_process
    del trainer  # and its readers: the evaluation loads its own
    if not (leads and evaluate):
        return None
    metrics = stored_metrics(folder) if was_finished else None
    return metrics or evaluate_run(folder, device=place, progress=progress)


def main() -> None:
    """Parse, train, evaluate, and print the results."""
    args = parse_arguments(TrainArguments, prog="latentwire_fast.train")
    from latentwire_fast.config.assignments import with_assignments
    from latentwire_fast.config.overrides import with_overrides
    from latentwire_fast.config.presets import load_preset
    from latentwire_fast.config.serialization import to_json
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.files.run_folder import RunFolder

    config = with_overrides(
        load_preset(args.preset),
        readers=parse_pairs(args.reader, option="--reader"),
        encoder=args.encoder,
        data=args.data,
        eval_data=args.eval_data,
        base=args.base,
        mode=args.mode,
        seed=args.seed,
        steps=args.steps,
        minutes=args.minutes,
        batch_size=args.batch_size,
        eval_examples=args.eval_examples,
        dtype=args.dtype,
    )
    config = with_assignments(config, args.assignments, reader_options=args.reader_options)
    if args.encoder is not None and config.encoder.source != args.encoder:
        found = config.encoder.source or f"encoder {config.encoder.kind!r}, which starts from no LM"
        raise ConfigError(f"--encoder {args.encoder}, and --set asks for {found}; leave out one")
    if args.print_config:
        print(json.dumps(to_json(config), indent=2))
        return
    if args.dry_run:
        from latentwire_fast.training.budget import budget

        print("\n".join(budget(config).lines()))
        return
    added = [*config.readers] if config.base else []
    run_dir = args.run or Path("runs") / "_".join([config.preset, *added])
    device = None if args.device is None else choose_device(args.device)
    metrics = train(
        config, run_dir, evaluate=not args.no_eval, cache=not args.no_cache, device=device
    )
    if metrics is not None:
        from latentwire_fast.evaluation.console import summary_lines

        print("\n".join(summary_lines(metrics)))
        print(f"report: {RunFolder(run_dir).report}")


make_callable(__name__, train)

if __name__ == "__main__":
    run_entry_point(main)
