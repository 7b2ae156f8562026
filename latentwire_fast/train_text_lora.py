"""Train a LoRA of one reader on text, so that it is a fair reader before latents are made for it.

    python -m latentwire_fast.train_text_lora --reader PATH --data squad.json --run runs/small
    python -m latentwire_fast.train squad_llama_qwen --reader small=runs/small/reader

The first prints one line of JSON: scores on held-out text before and after. What it saves is a peft
adapter with its tokenizer, which `--reader NAME=` takes like any other reader. Run the same command
again to resume what was stopped.

    python -m latentwire_fast.train_text_lora --reader testbed:llama --data testbed --gists 12 \\
        --run runs/gist

trains a baseline instead: gist tokens (Mu et al., 2023) behind the context, whose keys and values
are all that the answer sees of it. It sends nothing, so it has no payload.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from latentwire_fast.cli import (
    Dtype,
    Imports,
    choose_device,
    make_callable,
    parse_arguments,
    run_entry_point,
)

if TYPE_CHECKING:  # `--help` does without torch
    import torch

    from latentwire_fast.config.schema import RunConfig


GISTS = "gists"  # the preset's name of a run that trains gist tokens: `encoder.latents` of them


@dataclass(frozen=True)
class TextLoraArguments:
    """Train a LoRA of one reader on text: context and question to answer.

    Args:
        reader: source of the reader: a local folder, a hub id or testbed:NAME.
        data: testbed, a file in SQuAD's format, a saved data set, or hub:NAME.
        run: run folder. An unfinished run in it is resumed; RUN/reader is the reader.
        gists: train so many gist tokens with the updates: a baseline, and no reader's source.
        rank: of the updates.
        alpha: an update is scaled by alpha / rank.
        dropout: of what an update reads.
        projections: linear layers that get one, by the last parts of their names, such as q_proj;
            those of the attention unless given.
        layers: only in so many of the first layers.
        steps: optimiser steps.
        batch_size: contexts per step; each brings up to four of its questions.
        lr: learning rate of AdamW.
        micro_batch: contexts per forward pass; the whole batch unless given.
        validate_every: score a slice of the training data every so many steps, and keep the best
            step's reader in RUN/reader_best.
        validation_examples: size of that slice.
        patience: end after so many validations that were not the best.
        use_best: the run's reader is the best step's, not the last one's.
        eval_examples: held-out examples for the scores before and after.
        max_new_tokens: longest answer.
        save_every: steps between checkpoints.
        seed: of the first weights and of the order of the data.
        threads: of torch on a CPU.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: of the reader.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    reader: str
    data: str
    run: Path
    gists: int | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    projections: tuple[str, ...] = ()
    layers: int | None = None
    steps: int = 300
    batch_size: int = 8
    lr: float = 2e-4
    micro_batch: int | None = None
    validate_every: int | None = None
    validation_examples: int = 64
    patience: int | None = None
    use_best: tyro.conf.FlagCreatePairsOff[bool] = False
    eval_examples: int = 200
    max_new_tokens: int = 16
    save_every: int = 50
    seed: int = 0
    threads: int | None = None
    device: str | None = None
    dtype: Dtype = "float32"
    imports: Imports = ()


def text_lora_config(args: TextLoraArguments) -> RunConfig:
    """The run's configuration, from the command line.

    Raises:
        ConfigError: a value outside its range.
    """
    from latentwire_fast.config.base import require
    from latentwire_fast.config.schema import (
        DataConfig,
        EvalConfig,
        LoraSettings,
        OptimConfig,
        ReaderConfig,
        RunConfig,
        StageConfig,
        ValidationConfig,
    )
    from latentwire_fast.registry import ENCODERS, SCHEDULES

    lora = LoraSettings(
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        projections=args.projections or None,
        layers=args.layers,
        lr=1.0,
    )
    require(
        args.validate_every is not None or not (args.use_best or args.patience is not None),
        "--use-best and --patience need --validate-every STEPS",
    )
    require(
        args.gists is None or args.gists >= 1,
        f"--gists {args.gists}, expected at least 1; without it, none are trained",
    )
    return RunConfig(
        preset="text_lora" if args.gists is None else GISTS,
        encoder=ENCODERS.config("lm", **({} if args.gists is None else {"latents": args.gists})),
        seed=args.seed,
        threads=args.threads,
        readers={"reader": ReaderConfig(args.reader, dtype=args.dtype, lora=lora)},
        data=DataConfig(source=args.data, eval_examples=args.eval_examples),
        stages=(StageConfig("text", steps=args.steps),),
        optim=OptimConfig(
            muon_lr=None,
            adamw_lr=args.lr,
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=max(1, args.steps // 20)),
            batch_size=args.batch_size,
            micro_batch=args.micro_batch,
        ),
        evaluation=EvalConfig(batch_size=16, max_new_tokens=args.max_new_tokens),
        validation=None
        if args.validate_every is None
        else ValidationConfig(
            every=args.validate_every,
            examples=args.validation_examples,
            patience=args.patience,
            use_best=args.use_best,
        ),
        save_every=args.save_every,
    )


def train_text_lora(
    config: RunConfig,
    run: str | Path,
    *,
    device: torch.device | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Train a reader's low-rank updates on text, or go on where that was stopped, and score the
    reader without and with them. With `preset="gists"` they are trained with gist tokens, and the
    reader is scored on the text and on those (`training/gists.py`).

    Args:
        config: with one reader that has `lora` settings; see `TextLoraTrainer`.
        run: the run folder; made if missing.
        device: where to train; an accelerator, if torch sees one, unless given.
        progress: show progress bars.

    Returns:
        The content of scores.json; None in every process but the first, where several train.

    Raises:
        ConfigError, DataError, RunStopped, TrainingError, CheckpointError: as `train`.
    """
    from latentwire_fast.data.sources import heldout_examples
    from latentwire_fast.files.atomic import write_atomically
    from latentwire_fast.files.run_folder import TextLoraFolder
    from latentwire_fast.training.gists import GistTrainer, gist_scores
    from latentwire_fast.training.text_lora import TextLoraTrainer, before_and_after

    folder = TextLoraFolder(Path(run))
    heldout = [example for example in heldout_examples(config.data) if example.answers]
    is_gists = config.preset == GISTS
    trainer = (GistTrainer if is_gists else TextLoraTrainer)(
        config, folder.path, heldout=heldout, progress=progress, device=device
    )
    trainer.run()
    if not trainer.accelerator.is_main_process:
        return None
    config, place = trainer.config, trainer.accelerator.device
    del trainer  # and its reader
    if folder.scores.exists():
        stored: dict[str, Any] = json.loads(folder.scores.read_text())
        return stored
    score = gist_scores if is_gists else before_and_after
    result = score(config, folder, heldout, device=place, progress=progress)
    write_atomically(folder.scores, json.dumps(result) + "\n")
    return result


def main() -> None:
    """Parse, train, and print the scores before and after as one line of JSON."""
    args = parse_arguments(TextLoraArguments, prog="latentwire_fast.train_text_lora")
    config = text_lora_config(args)
    device = None if args.device is None else choose_device(args.device)
    scores = train_text_lora(config, args.run, device=device)
    if scores is not None:
        print(json.dumps(scores))


make_callable(__name__, train_text_lora)

if __name__ == "__main__":
    run_entry_point(main)
