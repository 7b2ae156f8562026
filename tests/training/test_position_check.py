"""Texts that a reader has no positions for: found before the first step, or left out of the scores
with the reason (F18); only what was asked for is reserved (F32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from latentwire_fast.config.schema import ObjectiveConfig, ReaderConfig, RunConfig, StageConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import DataError
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, OBJECTIVES
from latentwire_fast.serving import Receiver
from latentwire_fast.training.trainer import Trainer
from runs import soft, squad_file, tiny_config, train

POSITIONS = 60


@pytest.fixture(scope="module")
def gpt2(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A reader with a table of a few positions."""
    folder = tmp_path_factory.mktemp("positions") / "gpt"
    config = GPT2Config(
        vocab_size=len(llama_tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=POSITIONS,
        eos_token_id=llama_tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    llama_tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path, data: Path, *objectives: ObjectiveConfig) -> RunConfig:
    """Two steps of context mode; the contexts are longer than the table, the questions are not."""
    return tiny_config(
        folder,
        readers={"gpt": ReaderConfig(str(folder))},
        mode="context",
        data={"source": str(data), "questions_per_context": 1, "eval_examples": 6},
        encoder=ENCODERS.config("byte", latents=4, d_z=8, width=16, layers=1, heads=2),
        attachments=(soft(expansion=1),),
        stages=(StageConfig("answer", steps=2, objectives=objectives),),
        evaluation={"batch_size": 4, "timing_examples": 1, "resamples": 5, "bits": (6,)},
    )


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    return squad_file(make_examples(60, seed=3, facts=6), tmp_path / "long.json")


def test_text_that_does_not_fit_says_so_and_the_rest_is_scored(
    gpt2: Path, long_texts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config_of(gpt2, long_texts, OBJECTIVES.config("answer")), run)
    metrics = evaluate_run(run, progress=False)
    scores = metrics["readers"]["gpt"]
    assert scores["text"] is scores["embedding_replay"] is None
    assert scores["latent"]["f1"] is not None
    assert scores["closed_book"]["nll_per_token"] is not None
    reason = metrics["not_measured"]["text"]
    assert reason.startswith("does not fit: a prompt takes ")
    assert reason.endswith(f"positions, and reader 'gpt' knows {POSITIONS}")
    (line,) = (line for line in summary_lines(metrics) if line.startswith("full text  "))
    assert line.endswith("does not fit")
    assert "does not fit" in (run / "eval" / "report.html").read_text()


@pytest.mark.parametrize("kind", ["kd", "autoencode"])
def test_a_prompt_of_training_that_does_not_fit_is_found_before_the_first_step(
    gpt2: Path, long_texts: Path, tmp_path: Path, kind: str
) -> None:
    config = config_of(gpt2, long_texts, OBJECTIVES.config(kind))
    expected = (
        rf"stage 'answer', example '.*', prompt '(text|{kind})': it takes \d+ positions, and "
        rf"reader 'gpt' knows {POSITIONS}; shorten the texts, leave out the objectives"
    )
    with pytest.raises(DataError, match=expected):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists(), "it may be corrected and started here"


def test_a_heldout_question_that_does_not_fit_is_found_before_the_first_step(
    gpt2: Path, long_texts: Path, tmp_path: Path
) -> None:
    config = config_of(gpt2, long_texts, OBJECTIVES.config("answer"))
    question = Example("far", "Nulnak is old.", "Who is old and why? " * 12, ("Nulnak",))
    trainer = Trainer(config, tmp_path / "run", heldout=[question], progress=False)
    with pytest.raises(DataError, match=r"held-out example 'far': it takes \d+ positions"):
        trainer.run()


def test_only_what_was_asked_for_is_reserved(gpt2: Path) -> None:
    """The last position can be read, whatever the fixed memory of a graph would have room for."""
    reader = Reader.load(gpt2, name="gpt")
    prompt = Prompt([*range(20, 20 + POSITIONS - 7)], None, [False] * (POSITIONS - 7))
    options = DecodeOptions(max_new_tokens=8, eos_ban_steps=8)
    (ids,) = Receiver.for_text(reader).generate([prompt], options=options)
    assert len(ids) == 8
