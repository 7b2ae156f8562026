"""How well readers go on with a text of which they have the first half: as text, as a payload, not.

The measure of AutoCompressor (Chevalier et al. 2023) and ICAE (Ge et al. 2024): negative
log-likelihood per token of the second half of a paragraph. No question, no answer, no template: it
asks what a latent keeps of running text. All ways are read behind the same opening and label, and
predict the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import check_apart, endless_stream, load_examples
from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.metrics import ratio_interval
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.continuation import halves
from latentwire_fast.prompts.builder import Prompt, context_text
from latentwire_fast.readers.context_limit import ContextLimit
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.target_scores import PASS_LOGITS

logger = logging.getLogger(__name__)

# What stands for the first half, with a name for people.
WAYS = {
    "text": "the first half as text",
    "latent": "its payload",
    "token_budget": "its last tokens, as many as the payload takes positions",
    "nothing": "nothing",
    "shuffled_latent": "the payload of another paragraph",
}


def continuation_texts(config: RunConfig, readers: Mapping[str, Reader]) -> list[str]:
    """The paragraphs that a run is scored on; none where its configuration names no source.

    Raises:
        DataError: as `load_examples`, or a paragraph that the run was trained on.
    """
    settings = config.evaluation.continuation
    if settings is None:
        return []
    limit = ContextLimit(readers, config.data.max_context_tokens)
    seen: set[str] = set()

    def is_new(example: Example) -> bool:  # SQuAD asks several questions of one paragraph
        fits = example.context not in seen and halves(example.context)[1] != ""
        seen.add(example.context)
        return fits and limit.fits(example)

    found = load_examples(
        settings.source,
        split="heldout",
        count=settings.examples,
        seed=config.data.eval_seed,
        data=config.data,
        whole=True,
        keep=is_new,
    )
    limit.report(settings.source)
    if endless_stream(config.data, mode=config.mode, seed=0) is None:
        training = load_examples(
            config.data.source, split="train", count=None, seed=0, data=config.data
        )
        check_apart(training, found, source=config.data.source, eval_source=settings.source)
    return [example.context for example in found]


@dataclass(frozen=True)
class Halved:
    """Paragraphs cut in two, with the payloads of their first halves."""

    firsts: Sequence[str]
    rests: Sequence[str]
    payloads: Sequence[bytes]

    @classmethod
    @torch.no_grad()
    def of(cls, texts: Sequence[str], model: Interlingua, *, batch_size: int) -> Halved:
        """Cut and encode."""
        pairs = [halves(text) for text in texts]
        payloads: list[bytes] = []
        for start in range(0, len(pairs), batch_size):
            firsts = [first for first, _ in pairs[start : start + batch_size]]
            payloads += model.payloads(model.encode(firsts))
        return cls([first for first, _ in pairs], [rest for _, rest in pairs], payloads)


def measure_continuation(
    texts: Sequence[str],
    model: Interlingua,
    readers: Mapping[str, Reader],
    config: RunConfig,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """The `continuation` entry of metrics.json.

    Args:
        texts: of `continuation_texts`; at least one.
        progress: show a progress bar.
    """
    halved = Halved.of(texts, model, batch_size=config.evaluation.batch_size)
    options: dict[str, Any] = {"seed": config.seed, "resamples": config.evaluation.resamples}
    trained = any(
        objective.kind == "continuation" and objective.weight
        for stage in config.stages
        for objective in stage.objectives
    )
    entry: dict[str, Any] = {}
    count = len(readers) * len(WAYS)
    bar = tqdm(total=count, disable=not progress, desc="continuation", dynamic_ncols=True)
    for name, reader in readers.items():
        scores = _Scores(halved, model, reader, has_task_token=trained)
        nll = {}
        for way in WAYS:
            bar.set_postfix_str(f"{name}: {way}")
            nll[way] = scores.of(way)
            bar.update()
        latent = nll["latent"]
        entry[name] = {
            "nll_per_token": {
                way: ratio_interval(values, scores.tokens, **options)._asdict()
                for way, values in nll.items()
            },
            "latent_minus": {
                way: ratio_interval(
                    [ours - other for ours, other in zip(latent, values, strict=True)],
                    scores.tokens,
                    **options,
                )._asdict()
                for way, values in nll.items()
                if way != "latent"
            },
            "first_tokens_mean": mean([len(ids) for ids in scores.first_ids]),
            "scored_tokens_mean": mean(scores.tokens),
        }
    bar.close()
    settings = config.evaluation.continuation
    return {
        "source": None if settings is None else settings.source,
        "examples": len(texts),
        "payload_mean": mean([len(payload) for payload in halved.payloads]),
        "text_utf8_mean": mean([len(first.encode()) for first in halved.firsts]),
        "readers": entry,
    }


class _Scores:
    """Likelihoods of the second halves with one reader.

    Args:
        has_task_token: the model has learned to continue, behind a token of its own for that.

    Attributes:
        first_ids: tokens of the first halves. tokens: how many are predicted of each second half.
    """

    def __init__(
        self, halved: Halved, model: Interlingua, reader: Reader, *, has_task_token: bool
    ) -> None:
        self._halved, self._model, self._reader = halved, model, reader
        self._has_task_token = has_task_token
        builder = reader.prompts
        self.first_ids = builder.text_ids_of_many([context_text(text) for text in halved.firsts])
        self._rest_ids = [builder.answer_ids(rest) for rest in halved.rests]
        self.tokens = [len(ids) for ids in self._rest_ids]

    @torch.no_grad()
    def of(self, way: str) -> list[float]:
        """Negative log-likelihood of each second half, summed over its tokens."""
        count = len(self.tokens)
        prompts = [self._prompt(way, i) for i in range(count)]
        vocabulary = self._reader.head_weight.shape[0]
        size = max(1, PASS_LOGITS // (vocabulary * max(self.tokens)))
        found: list[float] = []
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            scores = self._reader.score([prompts[i] for i in rows], **self._inputs(way, rows))
            found += [-gold_n.sum().item() for gold_n in scores.by_prompt(scores.gold_N)]
        return found

    def _prompt(self, way: str, i: int) -> Prompt:
        """Opening, label, what stands for the first half, and the second half as targets."""
        builder = self._reader.prompts
        prompt = builder.build_context("", max_tokens=0)
        first = self.first_ids[i]
        label = len(builder.label_ids)
        if way == "text":
            prompt.add(first, content=True)
        else:
            prompt.add(builder.label_ids)
        if way == "token_budget":
            budget = self._model.compared_positions_of(self._reader.name)
            prompt.add(first[label:][-budget:], content=True)
        elif way in ("latent", "shuffled_latent"):
            prompt.latent_at = len(prompt.ids)
        prompt.add(self._rest_ids[i], target=True)
        return prompt

    def _inputs(self, way: str, rows: range) -> dict[str, Any]:
        """What the reader is given of the payloads."""
        if way not in ("latent", "shuffled_latent"):
            return {}
        # Of the next paragraph; they are all distinct.
        shift, payloads = int(way == "shuffled_latent"), self._halved.payloads
        latent_BMd = self._model.decode_payloads(
            [payloads[(i + shift) % len(payloads)] for i in rows]
        ).to(self._reader.device)
        task: Any = "continue" if self._has_task_token else None
        return {**self._model.reader_inputs(self._reader.name, latent_BMd, task=task)}
