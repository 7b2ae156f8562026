"""Low-rank updates (LoRA) of one reader trained on text: context and question to answer.

A small reader hardly answers from text as it is, and a latent that comes near to that proves
little. Trained on text first, it is a fair reader whose score is a bar. The loop, its checkpoints,
guards and validation are those of every run (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.scoring import batches
from latentwire_fast.files.run_folder import RunFolder, TextLoraFolder
from latentwire_fast.objectives.text_answers import TextAnswers
from latentwire_fast.readers.answer_checks import check_answers
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.gists import Gists
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.training.builders import build_data
from latentwire_fast.training.epochs import with_steps
from latentwire_fast.training.guards import FrozenGuard, NonFiniteGuard
from latentwire_fast.training.optimizers import build_optimizers
from latentwire_fast.training.session import Session, begin, go_on
from latentwire_fast.training.state import TrainingState
from latentwire_fast.training.trainer import Trainer
from latentwire_fast.training.validation import Ask, ask_text, validator_of


@dataclass(frozen=True)
class TextRecipe:
    """How one reader is trained.

    Attributes:
        trained: what gets gradients.
        objectives: what it learns.
        ask: makes what asks the reader when it is validated.
    """

    trained: ReaderLora | Gists
    objectives: TextAnswers
    ask: Callable[[DecodeOptions], Ask]


@dataclass(frozen=True)
class TextSession(Session):
    """A run that trains one reader's low-rank updates on text.

    Attributes:
        reader: the reader. lora: its updates. trained: these, and what is trained with them.
    """

    reader: Reader
    lora: ReaderLora
    trained: ReaderLora | Gists

    def parts(self) -> dict[str, nn.Module]:
        """What is trained."""
        return {self.reader.name: self.trained}

    def save(self, folder: Path) -> None:
        """Write the updates as peft does, and the tokenizer: a source of a reader."""
        self.trained.save(folder)
        self.reader.tokenizer.save_pretrained(folder)


class TextLoraTrainer(Trainer):
    """Trains the low-rank updates of the one reader of a run on text, in one folder.

    Of the configuration, encoder, bottleneck and attachments have no meaning here; its stages give
    the number of steps.

    Args, attributes: those of `Trainer`.
    """

    folder_kind: ClassVar[type[RunFolder]] = TextLoraFolder

    def _recipe(self, reader: Reader, lora: ReaderLora) -> TextRecipe:
        """What is trained of the reader, on what, and how it is asked meanwhile."""
        return TextRecipe(
            lora, TextAnswers({reader.name: reader}), partial(ask_text, reader=reader)
        )

    def _open(self) -> TextSession:
        config, accelerator = self.config, self.accelerator
        begin(config, accelerator)
        readers = load_readers(config.readers, accelerator.device)
        frozen = FrozenGuard({name: reader.model for name, reader in readers.items()})
        reader = _only_reader(readers)
        assert reader.lora_settings is not None
        lora = ReaderLora.fresh(reader, reader.lora_settings).train()
        if config.optim.gradient_checkpointing:
            reader.enable_gradient_checkpointing()
        data = build_data(config, readers)
        config = with_steps(config, data)
        check_answers(self.heldout, readers, source=f"{config.data.source} (held out)")
        recipe = self._recipe(reader, lora)
        optimizers = build_optimizers(recipe.trained, config.optim)
        size = config.optim.micro_batch or config.optim.batch_size
        session = TextSession(
            config=config,
            folder=self.folder,
            readers=readers,
            objectives=recipe.objectives,
            data=data,
            state=TrainingState(recipe.trained, optimizers, size),
            frozen=frozen,
            nonfinite=NonFiniteGuard(self.folder.nonfinite),
            validator=validator_of(config, data.validation, recipe.ask, modules=[recipe.trained]),
            reader=reader,
            lora=lora,
            trained=recipe.trained,
        )
        go_on(session, accelerator)
        return session


def _only_reader(readers: dict[str, Reader]) -> Reader:
    if len(readers) != 1 or next(iter(readers.values())).lora_settings is None:
        raise ConfigError(
            f"training on text is for one reader with `lora` settings, and the configuration has "
            f"{sorted(readers)}; give one, and what to train of it"
        )
    return next(iter(readers.values()))


def score_text(
    reader: Reader, examples: list[Example], config: RunConfig, *, progress: bool
) -> MethodResult:
    """Scores of a reader on examples as text, as it reads them now."""
    options = DecodeOptions(max_new_tokens=config.evaluation.max_new_tokens)
    ask = ask_text(options, reader=reader)
    total = MethodResult([], [], [])
    steps = list(batches(len(examples), config.evaluation.batch_size))
    for rows in tqdm(steps, disable=not progress, desc="score", unit="batch", dynamic_ncols=True):
        for _, result in ask([examples[i] for i in rows]):
            for name in ("predictions", "em", "f1", "nll", "tokens"):
                getattr(total, name).extend(getattr(result, name))
    return total


def before_and_after(
    config: RunConfig,
    folder: TextLoraFolder,
    heldout: list[Example],
    *,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    """Scores of a run's reader without the updates that were trained and with them: the content of
    scores.json."""
    (reader,) = load_readers(config.readers, device).values()
    lora = ReaderLora.load(folder.model)
    lora.attach(reader)
    options: dict[str, Any] = {
        "seed": config.seed,
        "resamples": config.evaluation.resamples,
        "clusters": [example.context for example in heldout],
    }

    def scores() -> dict[str, Any]:
        found = score_text(reader, heldout, config, progress=progress).intervals(**options)
        return {key: found[key] for key in ("f1", "em", "nll_per_token")}

    with reader.base():
        before = scores()
    return {
        "source": reader.source,
        "reader": str(folder.model),
        "parameters": lora.size,
        "steps": config.total_steps,
        "examples": len(heldout),
        "before": before,
        "after": scores(),
    }
