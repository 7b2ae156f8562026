"""The base class of evaluation methods: its place in the tables, and how its prompts are built.

A method gives each example's reader something to answer from: the text, a payload, less text,
nothing. All methods go through the same prompt builder, the same decoding and the same scorer.
Budgets count *content* positions: template and anchor are the same for all.

    class Reversed(EvaluationMethod):
        @dataclass(frozen=True)
        class Config(MethodConfig):
            "No settings."

        label, note, kind = "Reversed text", "the words from last to first", "floor"

        def build(self, case, rows, *, bits):
            ...
            return text_input(case, rows, user_ids)

    METHODS.register("reversed_text", Reversed)

What is registered is evaluated, and stands in metrics.json, the terminal and the report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.config.base import PartSettings
from latentwire_fast.config.schema import Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.pruning import word_spans
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn, question_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.self_information import word_self_information
from latentwire_fast.registry import METHODS, Registry
from latentwire_fast.serving.payload_batch import Message, payloads_of

Kind = Literal["reference", "ours", "budget", "floor"]
KINDS: tuple[Kind, ...] = ("reference", "ours", "budget", "floor")  # as the report orders them


@dataclass(frozen=True)
class EvaluationCase:
    """One reader with the examples that it answers by every method.

    Attributes:
        model: the trained interlingua; its mode says what a latent stands for.
        examples: each with at least one answer.
        payloads: at every bit width, one payload per example, or all those of its chunks.
        training_texts: texts that methods may be fitted to; none unless the run asks for it.
        alone: as `payloads`, for this reader alone, where it does not get all of a latent's slots.
        chunk_length: `RunConfig.scored_chunk_length`.
        hybrid_tokens: `EvalConfig.hybrid_tokens`.
    """

    model: Interlingua
    reader: Reader
    examples: Sequence[Example]
    payloads: Mapping[int, Sequence[Message]]
    training_texts: Sequence[str] = ()
    alone: Mapping[int, Sequence[Message]] = field(default_factory=dict)
    chunk_length: int | None = None
    hybrid_tokens: int | None = None

    @property
    def mode(self) -> Mode:
        """The part of a prompt that a latent stands for."""
        return self.model.mode

    def payload_size(self, i: int, *, bits: int) -> int:
        """Bytes of what is sent of example `i`."""
        return wire.payload_bytes(self.payloads[bits][i])

    def taken(self, payload: Message) -> int:
        """How many of the reader's positions a payload takes, or several of one text."""
        return sum(self.model.positions_of(self.reader.name, p) for p in payloads_of(payload))

    def positions(self, payload: Message) -> int:
        """How many positions of text it is compared with."""
        model, name = self.model, self.reader.name
        return sum(model.compared_positions_of(name, p) for p in payloads_of(payload))

    def positions_of(self, i: int) -> int:
        """How many positions of text the latents of example `i` are compared with."""
        return self.positions(self._any_payload(i))

    def _any_payload(self, i: int) -> Message:
        """What is sent of example `i`, at one of the bit widths."""
        return next(iter(self.payloads.values()))[i]

    @property
    def free_label(self) -> int:
        """Tokens of the context's label: in context mode it stands beside the latent, and so costs
        no method anything."""
        return len(self.reader.prompts.label_ids) if self.mode == "context" else 0

    def zero_payload(self, i: int, *, bits: int) -> Message:
        """Like the payload of example `i`, of latents that are zero everywhere."""
        own = self._any_payload(i)
        single = payloads_of(own)
        shape = self.model.encoder_config
        latents = [self.model.latents_of(payload) for payload in single]
        zeros = torch.zeros(len(single), shape.latents, shape.d_z)
        made = self.model.payloads(zeros, bits=bits, slots=latents)
        return made[0] if isinstance(own, bytes) else tuple(made)

    @cached_property
    def other_contexts(self) -> list[int]:
        """`other_contexts` of the examples."""
        return other_contexts(self.examples)

    @cached_property
    def longest_text(self) -> int:
        """Positions of the longest whole context, with what stands before it in a prompt."""
        build = self.reader.prompts.build_context
        return max((len(build(example.context).ids) for example in self.examples), default=0)

    @cached_property
    def word_information(self) -> dict[str, tuple[list[str], list[float]]]:
        """Per context, its words and how little the reader, as it was loaded, expected each (see
        `word_self_information`)."""
        contexts = list(dict.fromkeys(example.context for example in self.examples))
        spans = [word_spans(context) for context in contexts]
        with self.reader.base():
            scores = word_self_information(self.reader, contexts, spans)
        rows = zip(contexts, spans, scores, strict=True)
        return {text: ([text[a:b] for a, b in words], row) for text, words, row in rows}


@dataclass
class MethodInput:
    """Input of a reader for a batch of examples: text, payloads or embeddings.

    Attributes:
        prompts: one per example, with the gold answer as targets.
        positions: per prompt, how many positions the latent, or the text in its place, takes.
        payloads: one per prompt, or several in its place, all of one bit width.
        embeddings: ready soft prefixes `[M_i, D]`, one per prompt.
        sent_bytes: per prompt, what is sent in the text's place, where that is neither the text nor
            the example's own payload.
        answers: ready answers, where no reader is asked; there are no prompts then.
    """

    prompts: list[Prompt]
    positions: list[int]
    payloads: list[Message] | None = None
    embeddings: list[Tensor] | None = None
    answers: list[str] | None = None
    sent_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class MethodConfig(PartSettings):
    """Settings of an evaluation method; most have none."""

    registry: ClassVar[Registry] = METHODS


@dataclass(frozen=True)
class ByBits:
    """How scores at every bit width are shown.

    Attributes:
        columns: score and heading of each column in the report's table of bit widths; `{reader}`
            stands for the reader's name.
        legend, marker, line: of the curve in the figure of accuracy against bytes.
        beside: what the terminal writes before these scores in another method's line; a line of
            its own where it is empty.
    """

    columns: tuple[tuple[str, str], ...]
    legend: str
    marker: str = "D"
    line: str = "--"
    beside: str = ""


class EvaluationMethod(ABC):
    """One way to ask a reader. The registered name is its key in metrics.json.

    Attributes:
        label, note: its name and a few more words, in the report.
        kind: `reference` (what all else is held against), `ours`, `budget` (text cut to what the
            latent takes) or `floor` (what no method may fall below). It orders and colours rows.
        console_label: its name in the terminal: empty for the label in small letters, None to leave
            the method out there.
        sends: what takes the text's place on the wire, for the report's column of bytes.
        is_timed: whether the time to the first token and to the answer is measured.
        is_control: it knows nothing of the example but the question, so it must not score above
            closed book.
        in_model_card: whether the model card shows its F1.
        with_lora: whether a reader's low-rank updates (LoRA) are on while it reads text; with
            payloads they always are. Such a method is measured only with readers that have them.
        is_optional: whether most runs do without, so that the terminal names it only where it was
            measured.
        by_bits: given for a method that is scored at every bit width, beside the run's own.
    """

    Config: ClassVar[type[MethodConfig]]
    label: ClassVar[str]
    note: ClassVar[str] = ""
    kind: ClassVar[Kind] = "budget"
    console_label: ClassVar[str | None] = ""
    sends: ClassVar[Literal["text", "payload", "at most payload", "both", "nothing"]] = "nothing"
    is_timed: ClassVar[bool] = False
    is_control: ClassVar[bool] = False
    in_model_card: ClassVar[bool] = False
    with_lora: ClassVar[bool] = False
    is_optional: ClassVar[bool] = False
    by_bits: ClassVar[ByBits | None] = None

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def not_measured(self, case: EvaluationCase) -> str | None:
        """The reason why these examples cannot be used for the method; None where they can."""
        return None

    def fits(self, case: EvaluationCase) -> bool:
        """Whether it means anything with the case's reader."""
        return case.reader.lora is not None or not self.with_lora

    def facts(self, case: EvaluationCase) -> dict[str, float]:
        """Numbers beside the scores in the method's entry of metrics.json."""
        return {}

    def reading(self, case: EvaluationCase, inputs: MethodInput) -> AbstractContextManager[None]:
        """Inside the block the case's reader reads what this method has built: as it was loaded,
        where that is text."""
        adapted = self.with_lora or inputs.payloads is not None
        return nullcontext() if adapted else case.reader.base()

    @abstractmethod
    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The reader's input for some of the case's examples.

        Args:
            rows: the batch: indices of `case.examples`.
            bits: the bit width of payloads, and of the bytes that a budget allows.
        """


def evaluation_methods() -> dict[str, EvaluationMethod]:
    """Every registered method by its name, with default settings."""
    return {name: METHODS[name](METHODS.config(name)) for name in METHODS.names()}


def by_kind() -> dict[str, EvaluationMethod]:
    """`evaluation_methods` in the order in which people read them."""
    methods = evaluation_methods().items()
    return dict(sorted(methods, key=lambda item: KINDS.index(item[1].kind)))


def bits_key(name: str) -> str:
    """A method's key for its scores at every bit width, beside its own key."""
    return f"{name}_bits"


def sorted_widths(widths: Iterable[str]) -> list[str]:
    """Bit widths, as keys of results, the widest first."""
    return sorted(widths, key=int, reverse=True)


def methods_by_bits() -> dict[str, EvaluationMethod]:
    """The methods that are scored at every bit width, by `bits_key`."""
    methods = evaluation_methods().items()
    return {bits_key(name): method for name, method in methods if method.by_bits}


# --- prompts --------------------------------------------------------------------------------------


def turns(example: Example) -> list[Turn]:
    """The example's question with its gold answer."""
    return [Turn(example.question, example.answers[0])]


def text_input(
    case: EvaluationCase, rows: range, user_ids: Sequence[Sequence[int] | None]
) -> MethodInput:
    """Text prompts whose user part is the given ids; None stands for the whole text."""
    examples = [case.examples[i] for i in rows]
    prompts = [
        case.reader.prompts.build(turns(example), context=example.context, user_ids=ids)
        for example, ids in zip(examples, user_ids, strict=True)
    ]
    return MethodInput(prompts, content_positions(case, prompts, examples))


def latent_input(case: EvaluationCase, rows: range, payloads: list[Message]) -> MethodInput:
    """Prompts in which these payloads stand in the text's place, one per example."""
    prompts = [
        case.reader.prompts.build(turns(example), context=example.context, latent=case.mode)
        for example in (case.examples[i] for i in rows)
    ]
    return MethodInput(prompts, [*map(case.positions, payloads)], payloads=payloads)


def content_positions(
    case: EvaluationCase, prompts: Sequence[Prompt], examples: Sequence[Example]
) -> list[int]:
    """Per prompt, the content positions in the latent's place: in context mode its label and the
    question are not among them."""
    if case.mode == "pure":
        return [prompt.content for prompt in prompts]
    ids = case.reader.prompts.text_ids
    questions = [len(ids(question_text(example.question))) for example in examples]
    return [
        max(0, prompt.content - question - case.free_label)
        for prompt, question in zip(prompts, questions, strict=True)
    ]


def unanswered(prompt: Prompt) -> Prompt:
    """A one-turn prompt without its answer: what decoding starts from."""
    end = prompt.is_target.index(True) if any(prompt.is_target) else len(prompt.ids)
    return Prompt(prompt.ids[:end], prompt.latent_at, prompt.is_target[:end], prompt.content)


# --- texts ----------------------------------------------------------------------------------------


def cut_utf8(text: str, size: int) -> str:
    """The longest prefix of a text whose UTF-8 form has at most `size` bytes."""
    return text.encode()[: max(0, size)].decode(errors="ignore")


def other_contexts(examples: Sequence[Example]) -> list[int]:
    """Per example, the next one (cyclic) with another context; itself where all contexts are equal.

    Data sets ask several questions of one passage: a mere neighbour's latent may stand for the same
    text.
    """
    count = len(examples)

    def partner(i: int) -> int:
        following = ((i + step) % count for step in range(1, count))
        return next((j for j in following if examples[j].context != examples[i].context), i)

    return [partner(i) for i in range(count)]
