"""Gist tokens as a baseline: what hides the context, and the run that trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.schema import LoraSettings, RunConfig
from latentwire_fast.errors import CheckpointError, ConfigError, RunStopped
from latentwire_fast.files.run_folder import TextLoraFolder
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.gists import GISTS, Gists, gist_mask, gist_prompt
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.train_text_lora import TextLoraArguments, text_lora_config, train_text_lora
from latentwire_fast.training.gists import GistTrainer
from runs import changed, new_process, records

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("on_the_cpu")


def of(reader: Path, run: Path, **changes: Any) -> RunConfig:
    sizes = {"rank": 2, "steps": 4, "batch_size": 4, "lr": 0.01, "eval_examples": 3, "threads": 1}
    options: dict[str, Any] = {"gists": 3, "max_new_tokens": 3, **sizes, **changes}
    arguments = TextLoraArguments(reader=str(reader), data="testbed", run=run, **options)
    return changed(text_lora_config(arguments), log_every=1)


def fresh(folder: Path, count: int = 3) -> tuple[Reader, Gists]:
    reader = Reader.load(folder, name="reader")
    lora = ReaderLora.fresh(reader, LoraSettings(rank=2))
    return reader, Gists.fresh(reader, lora, count).eval()


def test_the_mask_hides_the_context_from_what_follows() -> None:
    """One id of a template, two of context, one gist token, two of a question."""
    mask_TT = gist_mask(torch.zeros(1, 6, 4), start=1, ends=[3], gists=1)[0, 0]
    assert [[int(v == 0) for v in row] for row in mask_TT.tolist()] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("family", ["llama_folder", "qwen_folder"])
def test_the_answer_sees_the_context_through_gist_tokens_alone(
    family: str, request: pytest.FixtureRequest
) -> None:
    """With their keys and values cut off from the context, another context changes nothing."""
    reader, gists = fresh(request.getfixturevalue(family))
    turns = [Turn("Who?", "Bakrim")]
    contexts = ["Nulnak is old and Fosvun is new.", "Fosvun is old and Nulnak is new."]
    prompts = [gist_prompt(reader.prompts, turns, context) for context in contexts]
    assert len({len(prompt.ids) for prompt in prompts}) == 1, "of one length"
    hidden = [gists.target_hidden(reader, [prompt])[0] for prompt in prompts]
    assert not torch.allclose(hidden[0], hidden[1])
    blind = [prompt.latent_at for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:

        def without_context(like_BTD: Any, *, start: int, ends: Any, gists: int) -> Any:
            mask_B1TT = gist_mask(like_BTD, start=start, ends=ends, gists=gists)
            mask_B1TT[:, :, blind[0] :, start : blind[0]] = torch.finfo(like_BTD.dtype).min
            return mask_B1TT

        patch.setattr("latentwire_fast.readers.gists.gist_mask", without_context)
        hidden = [gists.target_hidden(reader, [prompt])[0] for prompt in prompts]
    torch.testing.assert_close(hidden[0], hidden[1])


def test_rows_of_a_batch_are_read_as_alone(llama_folder: Path) -> None:
    reader, gists = fresh(llama_folder)
    contexts = ["Nulnak is old.", "Fosvun is new, and Bakrim is not."]
    prompts = [gist_prompt(reader.prompts, [Turn("Who?", "Bakrim")], c) for c in contexts]
    together = gists.score(reader, prompts).gold_N
    alone = [gists.score(reader, [prompt]).gold_N for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    questions = [gist_prompt(reader.prompts, [Turn("Who?")], c) for c in contexts]
    answers = gists.answers(reader, questions, most=3)
    assert answers == [gists.answers(reader, [q], most=3)[0] for q in questions]


def test_a_run_trains_resumes_saves_and_is_scored(llama_folder: Path, tmp_path: Path) -> None:
    whole = of(llama_folder, tmp_path / "whole")
    new_process(0)
    scores = train_text_lora(whole, tmp_path / "whole", progress=False)
    assert scores is not None
    assert (scores["gists"], scores["examples"], scores["payload_bytes"]) == (3, 3, None)
    assert "nothing is sent" in scores["note"]
    assert scores["cache_bytes_fp16"] > 0
    assert scores["gist"]["nll_per_token"]["mean"] != scores["text"]["nll_per_token"]["mean"]
    lines = records(tmp_path / "whole")
    assert set(lines[0]["losses"]) == {"text/reader"}
    assert lines[0]["grad_norm"] > 0
    new_process(1)
    cut = GistTrainer(whole, tmp_path / "cut", progress=False)
    cut.signals.number = 15
    with pytest.raises(RunStopped):
        cut.run()
    before = cut.session.trained.tokens_GD.clone()  # type: ignore[attr-defined]
    new_process(2)
    again = train_text_lora(whole, tmp_path / "cut", progress=False)
    assert records(tmp_path / "cut") == lines
    assert {**again, "source": ""} == {**scores, "source": ""}  # type: ignore[dict-item]
    loaded = Gists.load(TextLoraFolder(tmp_path / "cut").model, Reader.load(llama_folder, name="r"))
    assert not torch.equal(loaded.tokens_GD, before), "they are trained"


def test_wrong_gist_tokens_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gists 0, expected at least 1"):
        of(llama_folder, tmp_path, gists=0)
    reader, gists = fresh(llama_folder)
    gists.save(tmp_path)
    with pytest.raises(ConfigError, match=r"is a baseline of gist tokens.* without `--gists`"):
        Reader.load(tmp_path, name="r")
    (tmp_path / GISTS).unlink()
    with pytest.raises(CheckpointError):
        Gists.load(tmp_path, reader)
