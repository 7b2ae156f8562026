"""Validation: scores on a fixed slice while a run trains, which change nothing in the training.

A validation is one entry of a list that the run's checkpoints hold: the step, by reader the NLL per
answer token and F1, the metric's value (the mean over readers), and that value smoothed. What is
best, and whether training is of any more use, follows from the list alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from latentwire_fast.config.schema import RunConfig, ValidationConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.encoding import encode_examples
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.methods.base import turns
from latentwire_fast.evaluation.scoring import batches, judge_prompts
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions
from latentwire_fast.training.distributed import Reducer
from latentwire_fast.training.optimizer_state import restore_rng_state, rng_state
from latentwire_fast.training.time_limit import passes

Validation = dict[str, Any]
Sums = dict[str, dict[str, float]]  # by reader
Ask = Callable[[Sequence[Example]], Iterator[tuple[str, MethodResult]]]

# Captured graphs would hold memory that the next step needs.
_EAGER = ReceiverOptions(engine="eager")


class Validator:
    """Scores what is trained on a fixed slice.

    Args:
        begin: makes what asks the readers about a batch of examples, anew at each validation.
        batch_size: examples at a time.
        modules: what is trained: in eval mode while it is scored.
    """

    def __init__(
        self,
        settings: ValidationConfig,
        examples: Sequence[Example],
        begin: Callable[[], Ask],
        *,
        batch_size: int,
        modules: Sequence[nn.Module],
    ) -> None:
        self.settings = settings
        self.examples = [example for example in examples if example.answers]
        self._begin = begin
        self._batch_size = batch_size
        self._modules = modules

    def is_due(
        self, step: int, done: Sequence[Validation], *, last: bool, previous: int | None = None
    ) -> bool:
        """Whether there is to be one behind so many steps, and has been none yet.

        Args:
            previous: steps before the one that was done last; `step - 1`, unless some were left
                out.
        """
        before = step - 1 if previous is None else previous
        wanted = last or (step > 0 and passes(before, step, self.settings.every))
        return wanted and not (done and done[-1]["step"] == step)

    @torch.no_grad()
    def run(
        self, reducer: Reducer, *, is_stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, float]] | None:
        """NLL per answer token and F1 by reader; the processes share the work.

        Args:
            is_stopped: asked after each batch. One process alone then leaves off and returns None;
                several go on, since they have to do so together.
        """
        own = self.examples[reducer.accelerator.process_index :: reducer.accelerator.num_processes]
        sums: Sums = {}
        with _undisturbed(self._modules):
            ask = self._begin()
            for rows in batches(len(own), self._batch_size):
                for name, result in ask([own[i] for i in rows]):
                    _add(sums, {name: _sums_of(result)})
                    if reducer.alone and is_stopped():
                        return None
        total: Sums = {}
        for of_process in reducer.each(sums):
            _add(total, of_process)
        return {
            name: {"nll": found["nll"] / found["tokens"], "f1": found["f1"] / found["examples"]}
            for name, found in sorted(total.items())
        }

    # --- what the scores say ----------------------------------------------------------------------

    def judge(
        self, step: int, scores: Mapping[str, Mapping[str, float]], done: Sequence[Validation]
    ) -> Validation:
        """The entry of a validation behind the ones that were done."""
        values = [of_reader[self.settings.metric] for of_reader in scores.values()]
        value, ema = sum(values) / len(values), self.settings.ema
        smoothed = ema * done[-1]["smoothed"] + (1 - ema) * value if done else value
        return {"step": step, "scores": dict(scores), "value": value, "smoothed": smoothed}

    def best(self, done: Sequence[Validation]) -> Validation | None:
        """The validation with the best smoothed value; of equal ones the first."""
        sign = 1 if self.settings.metric == "nll" else -1
        return min(done, key=lambda entry: sign * entry["smoothed"], default=None)

    def has_stalled(self, done: Sequence[Validation]) -> bool:
        """Whether the last validations, as many as the settings' patience, were none of them the
        best."""
        best, patience = self.best(done), self.settings.patience
        if best is None or patience is None:
            return False
        return len(done) - 1 - done.index(best) >= patience

    def summary(self, done: Sequence[Validation]) -> dict[str, Any]:
        """The content of validation.json."""
        return {
            "metric": self.settings.metric,
            "ema": self.settings.ema,
            "examples": len(self.examples),
            "last": done[-1],
            "best": self.best(done),
            "stopped_early": self.has_stalled(done),
            "model": "best" if self.settings.use_best else "last",
            "validations": list(done),
        }


def validator_of(
    config: RunConfig,
    examples: Sequence[Example],
    ask: Callable[[DecodeOptions], Ask],
    *,
    modules: Sequence[nn.Module],
) -> Validator | None:
    """The validator of a run; None where it does not validate.

    Args:
        examples: the slice.
        ask: makes what asks the readers, anew at each validation, of how answers are decoded.
        modules: as in `Validator`.
    """
    if config.validation is None:
        return None
    options = DecodeOptions(max_new_tokens=config.evaluation.max_new_tokens)
    return Validator(
        config.validation,
        examples,
        lambda: ask(options),
        batch_size=config.evaluation.batch_size,
        modules=modules,
    )


def _sums_of(result: MethodResult) -> dict[str, float]:
    return {
        "nll": sum(result.nll),
        "tokens": sum(result.tokens),
        "f1": sum(result.f1),
        "examples": len(result.f1),
    }


def _add(total: Sums, more: Sums) -> None:
    for name, values in more.items():
        known = total.setdefault(name, dict.fromkeys(values, 0.0))
        for key, value in values.items():
            known[key] += value


def ask_latents(
    options: DecodeOptions,
    *,
    model: Interlingua,
    readers: Mapping[str, Reader],
    chunk_length: int | None = None,
) -> Ask:
    """Asks every reader about payloads of the model as it is now, at its bottleneck's bits."""
    model.__dict__.pop("fingerprints", None)  # of the encoder as it was at the last validation
    receivers = {n: Receiver.of(model, reader, options=_EAGER) for n, reader in readers.items()}

    def ask(examples: Sequence[Example]) -> Iterator[tuple[str, MethodResult]]:
        payloads = encode_examples(model, examples, chunk_length=chunk_length).messages(model)
        for name, receiver in receivers.items():
            prompts = [
                receiver.reader.prompts.build(turns(e), context=e.context, latent=model.mode)
                for e in examples
            ]
            yield (
                name,
                judge_prompts(receiver, prompts, examples, payloads=payloads, options=options),
            )

    return ask


def ask_text(options: DecodeOptions, *, reader: Reader) -> Ask:
    """Asks a reader about the text itself, with its low-rank updates."""
    receiver = Receiver.for_text(reader, options=_EAGER)

    def ask(examples: Sequence[Example]) -> Iterator[tuple[str, MethodResult]]:
        prompts = [reader.prompts.build(turns(e), context=e.context) for e in examples]
        yield reader.name, judge_prompts(receiver, prompts, examples, options=options)

    return ask


@contextmanager
def _undisturbed(trained: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block modules are in eval mode; behind it all is as it was: their modes, and every
    random generator."""
    modes = [(module, module.training) for whole in trained for module in whole.modules()]
    tensors, state = rng_state({})
    for module in trained:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        restore_rng_state({}, tensors=tensors, state=state)
        for module in trained:
            module.__dict__.pop("fingerprints", None)  # a model's: it goes on to change
