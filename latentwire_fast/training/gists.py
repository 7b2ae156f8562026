"""Gist tokens of one reader, trained as a baseline (`readers/gists.py`): the loop is that of every
run, and the scores stand beside the reader's own on text and without any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.methods.base import turns
from latentwire_fast.evaluation.scoring import add_likelihoods, batches, judge_answers
from latentwire_fast.files.run_folder import TextLoraFolder
from latentwire_fast.objectives.gist_answers import GistAnswers
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.gists import Gists, gist_prompt
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.training.text_lora import TextLoraTrainer, TextRecipe, score_text
from latentwire_fast.training.validation import Ask

NOTE = "keys and values of one reader, which no other reader can use: nothing is sent"


class GistTrainer(TextLoraTrainer):
    """Trains gist tokens, as many as `encoder.latents`, with low-rank updates of the one reader."""

    def _recipe(self, reader: Reader, lora: ReaderLora) -> TextRecipe:
        gists = Gists.fresh(reader, lora, self.config.encoder.latents).train()
        ask = partial(ask_gists, reader=reader, gists=gists)
        return TextRecipe(gists, GistAnswers(reader, gists), ask)


def ask_gists(options: DecodeOptions, *, reader: Reader, gists: Gists) -> Ask:
    """Asks a reader about its gist tokens of the text."""

    def ask(examples: Sequence[Example]) -> Iterator[tuple[str, MethodResult]]:
        prompts = [gist_prompt(reader.prompts, turns(e), e.context) for e in examples]
        questions = [
            gist_prompt(reader.prompts, [replace(turns(e)[0], answer=None)], e.context)
            for e in examples
        ]
        said = gists.answers(reader, questions, most=options.max_new_tokens)
        result = judge_answers(said, examples)
        add_likelihoods(result, gists.score(reader, prompts))
        yield reader.name, result

    return ask


@torch.no_grad()
def gist_scores(
    config: RunConfig,
    folder: TextLoraFolder,
    heldout: list[Example],
    *,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    """Scores of a run's reader on the whole text, without its updates, and on its gist tokens
    alone: the content of scores.json."""
    (reader,) = load_readers(config.readers, device).values()
    text = score_text(reader, heldout, config, progress=progress)
    gists = Gists.load(folder.model, reader)
    options = DecodeOptions(max_new_tokens=config.evaluation.max_new_tokens)
    ask = ask_gists(options, reader=reader, gists=gists)
    found = MethodResult([], [], [])
    for rows in batches(len(heldout), config.evaluation.batch_size):
        for _, result in ask([heldout[i] for i in rows]):
            for name in ("predictions", "em", "f1", "nll", "tokens"):
                getattr(found, name).extend(getattr(result, name))
    intervals: dict[str, Any] = {
        "seed": config.seed,
        "resamples": config.evaluation.resamples,
        "clusters": [example.context for example in heldout],
    }

    def scores(result: MethodResult) -> dict[str, Any]:
        entry = result.intervals(**intervals)
        return {key: entry[key] for key in ("f1", "em", "nll_per_token")}

    geometry = reader.kv_geometry
    per_token = 2 * geometry.layers * geometry.heads * geometry.head_width
    return {
        "source": reader.source,
        "gists": gists.count,
        "parameters": sum(weight.numel() for weight in gists.parameters()),
        "steps": config.total_steps,
        "examples": len(heldout),
        "text": scores(text),
        "gist": scores(found),
        "payload_bytes": None,
        "cache_bytes_fp16": 2 * per_token * gists.count,
        "note": NOTE,
    }
