"""The harness's model class: one reader of a run, asked with text or with payloads.

Only the harness imports this module (`register` tells it where it is): it needs `lm_eval`.

With `mode=text` everything is the harness's own `hf` class on the run's reader: the same tokens,
the same numbers. With `mode=payload` the context part of each request (`requests.py`) is encoded
and packed, and the reader gets the payload in its place.

Shapes: N tokens of the continuations of a batch.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.harness.context_payloads import ContextPayloads, Key, Message
from latentwire_fast.evaluation.harness.options import (
    HarnessMode,
    check_options,
    device_of,
    reader_of,
)
from latentwire_fast.evaluation.harness.request_prompts import RequestPrompts
from latentwire_fast.evaluation.harness.requests import split_request
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions

logger = logging.getLogger(__name__)

FIRST_TOKENS = 16  # decoded before it is looked whether all answers have ended


class _Asked(NamedTuple):
    """One request: its number in the harness's order, the prompt, and what stands for its text."""

    number: int
    prompt: Prompt
    message: Message


class LatentWireLM(HFLM):
    """A reader of a run, behind the harness's interface.

    Args:
        pretrained: the run folder.
        reader: name of one of its readers.
        mode: `payload` or `text`.
        bits: of a payload's values; the model's own number unless given.
        context_field: the field of a task's documents that holds the context part; `context`
            unless given.
        chunk_length: as in `encode --chunk-length`.
        prefix_gain: as in `generate`.
        dtype: that the reader computes in; the run's own unless given.
        imports: modules to import first, with + between them: they register parts of your own.
        device, batch_size: as in the harness; `auto` for the batch size in text mode only.
        options: those of `hf` (`SHARED_OPTIONS`, `TEXT_OPTIONS`).

    Raises:
        ConfigError, CheckpointError: no such run or reader, or an option that cannot be.
    """

    def __init__(
        self,
        pretrained: str,
        reader: str | None = None,
        mode: HarnessMode = "payload",
        *,
        bits: int | None = None,
        context_field: str | None = None,
        chunk_length: int | None = None,
        prefix_gain: float | None = None,
        dtype: str | None = None,
        imports: str = "",
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        own = {
            "bits": bits,
            "context_field": context_field,
            "chunk_length": chunk_length,
            "prefix_gain": prefix_gain,
        }
        check_options(mode, own, batch_size, options)
        for module in filter(None, imports.split("+")):
            importlib.import_module(module)
        run = RunFolder(Path(pretrained))
        chosen = device_of(device)
        name, config = reader_of(run, reader)
        self.reader = Reader.from_config(name, config, chosen, dtype=dtype)
        super().__init__(
            pretrained=self.reader.model,
            tokenizer=self.reader.tokenizer,
            backend="causal",
            batch_size=batch_size,
            **options,
        )
        self.mode = mode
        self.run = run
        self.context_field = context_field or "context"
        if mode == "text":
            return
        model = Interlingua.from_pretrained(run.model).to(chosen)
        if bits is not None:
            model.bottleneck_config.require_rate(bits, "bits")
        gain = 1.0 if prefix_gain is None else prefix_gain
        self.receiver = Receiver.of(model, self.reader, options=ReceiverOptions(prefix_gain=gain))
        self.contexts = ContextPayloads(
            model, bits=bits, chunk_length=chunk_length, batch_size=self.batch_size
        )
        deep = model.attachment(name, "deep")
        head = 0 if deep is None else deep.head_positions
        self.prompts = RequestPrompts(self.reader, model.mode, head=head)

    # --- what the harness asks for ------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it.

        Raises:
            DataError: a request has no context part.
        """
        if self.mode == "text":
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return found
        asked = self._asked(requests, [request.args[1] for request in requests])
        answers: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(asked, disable_tqdm, "loglikelihood"):
            scores = self.receiver.score(
                [one.prompt for one in batch], payloads=[one.message for one in batch]
            )
            # Here a token that ends an answer is a token like others.
            scores = replace(scores, stop_ids=())
            gold = scores.by_prompt(scores.gold_N)
            hits = scores.by_prompt(scores.ranked_NK(1)[:, 0] == scores.labels_N)
            for one, gold_n, hit_n in zip(batch, gold, hits, strict=True):
                answer = float(gold_n.sum()), bool(hit_n.all())
                answers[one.number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[one.number].args, answer)
        self._report()
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts: in text mode only.

        Raises:
            ConfigError: payload mode.
        """
        if self.mode == "payload":
            raise ConfigError(
                "loglikelihood_rolling scores a whole text, and there is no context part that a "
                "payload could stand for; run this task with mode=text"
            )
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the reader writes, up to the first of a task's stop texts.

        Raises:
            ConfigError: payload mode and options of decoding that are not greedy.
            DataError: a request has no context part.
        """
        if self.mode == "text":
            found: list[str] = super().generate_until(requests, disable_tqdm)
            return found
        asked = self._asked(requests, None)
        # Requests of one batch share their options.
        groups: dict[str, list[_Asked]] = {}
        for one in asked:
            groups.setdefault(repr(requests[one.number].args[1]), []).append(one)
        answers: dict[int, str] = {}
        for group in groups.values():
            settings = requests[group[0].number].args[1]
            until, tokens = self._decoding(settings)
            for batch in self._batches(group, disable_tqdm, "generate_until"):
                for one, text in zip(batch, self._write(batch, until, tokens), strict=True):
                    answers[one.number] = text
                    args = requests[one.number].args
                    self.cache_hook.add_partial("generate_until", args, text)
        self._report()
        return [answers[number] for number in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, as `hf` makes it.

        Raises:
            ConfigError: a payload stands for the whole text of the user (pure mode).
        """
        if self.mode == "payload" and self.contexts.model.mode == "pure":
            raise ConfigError(
                "--apply_chat_template: this run's latents stand for the whole request (pure "
                "mode), and the reader's template is put around them anyway; leave the option out"
            )
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the scores."""
        info = {
            "model_num_parameters": self.reader.model.num_parameters(),
            "model_dtype": str(self.reader.model.dtype),
            "latentwire_mode": self.mode,
            "latentwire_reader": self.reader.name,
        }
        if self.mode == "payload":
            info["latentwire_bits"] = (
                self.contexts.bits or self.contexts.model.bottleneck_config.bits
            )
            info |= {f"latentwire_{key}": value for key, value in self.contexts.summary().items()}
        return info

    # --- payload mode -------------------------------------------------------------------------

    def _asked(
        self, requests: Sequence[Instance], continuations: Sequence[str] | None
    ) -> list[_Asked]:
        """The prompts and payloads of requests, long prompts first as in `hf`."""
        prompts: list[Prompt] = []
        keys: list[Key] = []
        for number, request in enumerate(requests):
            parts = split_request(
                request.args[0], request.doc, field=self.context_field, task=request.task_name
            )
            continuation = None if continuations is None else continuations[number]
            prompts.append(self.prompts.prompt(parts, continuation))
            keys.append(self.prompts.key(parts))
        messages = self.contexts.of(keys)
        asked = [
            _Asked(number, prompt, message)
            for number, (prompt, message) in enumerate(zip(prompts, messages, strict=True))
        ]
        return sorted(asked, key=lambda one: -len(one.prompt.ids))

    def _batches(self, asked: Sequence[_Asked], quiet: bool, what: str) -> Any:
        """Batches of requests, under a progress bar."""
        starts = range(0, len(asked), self.batch_size)
        for start in tqdm(starts, desc=f"Running {what} requests", unit="batch", disable=quiet):
            yield asked[start : start + self.batch_size]

    def _decoding(self, settings: dict[str, Any]) -> tuple[list[str], int]:
        """The stop texts of a task, and how many tokens it allows.

        Raises:
            ConfigError: it samples.
        """
        options = normalize_gen_kwargs(settings, self.max_gen_toks)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options.get("until"), eos=end)
        if options.get("do_sample"):
            raise ConfigError(
                "this task samples (do_sample or a temperature), and payloads are answered with "
                "the likeliest tokens; add --gen_kwargs do_sample=False,temperature=0"
            )
        return until, int(options["max_gen_toks"])

    def _write(self, batch: Sequence[_Asked], until: list[str], tokens: int) -> list[str]:
        """Answers, each cut at its first stop text.

        Decoding ends at tokens, not at texts. So a few tokens are decoded first, and four times as
        many, from the same prefill, while an answer goes on.
        """
        first = self.receiver.prefill(
            [one.prompt for one in batch], payloads=[one.message for one in batch]
        )
        limit = min(FIRST_TOKENS, tokens)
        while True:
            rows = first.generate(DecodeOptions(max_new_tokens=limit))
            texts = [self.tok_decode(ids) for ids in rows]
            cut = [postprocess_generated_text(text, until, None) for text in texts]
            goes_on = (
                len(ids) == limit and text == short
                for ids, text, short in zip(rows, texts, cut, strict=True)
            )
            if limit == tokens or not any(goes_on):
                return cut
            limit = min(4 * limit, tokens)

    def _report(self) -> None:
        """Log what was sent."""
        found = self.contexts.summary()
        if found["contexts"]:
            logger.info(
                "%d contexts as payloads of %.1f bytes on average, their texts have %.1f (%.1f "
                "with brotli)",
                *found.values(),
            )
