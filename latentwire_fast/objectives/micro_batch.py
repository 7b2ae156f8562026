"""The results that a stage's objectives share over one micro-batch: nothing is computed twice.

`EncodedBatch` holds what the encoder makes of the items, for all readers; `ReaderBatch` what one
reader makes of that. Shapes: B items, T positions of a text, N scored tokens, M latents, D the
reader's width, V vocabulary, d `d_z`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.models.attachments.base import ReaderInputs
from latentwire_fast.models.interlingua import Interlingua, Task
from latentwire_fast.models.joined import Pieces, joined_inputs
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.ops import LinearLosses
from latentwire_fast.prompts.batch import PromptBatch
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.attention_targets import AttentionQuestion, attention_targets
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.trace import Observation, observe

Texts = tuple[str, ...]


class EncodedBatch:
    """The items of a micro-batch, with their latents.

    Args:
        bits: width that latents are quantised to on their way to the readers; None for none.
        rate: also measure what the items' payloads take.
        select: also ask the encoder for the positions that its latents stand at.
        hold: the encoder is not trained.
        gain: what readers get is so many times as strong (see the attachments).
        dropout: share of the latents, drawn anew for each text, that readers get zeros for.
        cut: cut the graph behind the encoder. Backward through a reader's loss then ends at the
            cut, and `backward` goes on from there, once for all readers.

    Attributes:
        pieces: how many latents each item has; `B` counts latents where an item has several.
        latent_BMd: the items' latents before quantisation, detached.
        sent_BMd: what the readers get of them.
        bottleneck_loss_B: by item, the bottleneck's own loss; None where it has none, or where the
            latents are not sent.
        rate_B: by item, about the bits of its payload's body; None unless `rate`.
        selection: the positions and their scores; None unless `select`.
    """

    def __init__(
        self,
        items: Sequence[PreparedItem],
        model: Interlingua,
        *,
        bits: int | None,
        select: bool,
        rate: bool = False,
        cut: bool,
        hold: bool = False,
        gain: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        self.items = items
        self.model = model
        self._bits = bits
        self._cut = cut
        self._hold = hold
        self.gain = gain
        self._dropout = dropout
        self._cuts: list[tuple[Tensor, Tensor]] = []  # (end of the encoder's graph, leaf behind it)
        self._sent: dict[tuple[Texts, Texts | None], Tensor] = {}
        contexts = tuple(chunk for p in items for chunk in p.chunks)
        asked = (p.question for p in items for _ in p.chunks)
        questions = tuple(question for question in asked if question is not None) or None
        slots = model.encoder.latent_counts(contexts, questions)
        self.pieces = Pieces(tuple(len(p.chunks) for p in items), slots)
        self.selection: Selection | None = None
        if select:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not hold):
                latent_BMd, selection = model.select(contexts, questions)
            scores_BT = self._leaf(selection.scores_BT)
            self.selection = replace(selection, scores_BT=scores_BT)
        else:
            latent_BMd = self._encode(contexts, questions)
        if model.encoder_config.hints and model.training:  # a validation knows no answers
            length_of = model.encoder.length_of
            lengths = [[length_of(turn.answer or "") for turn in p.item.turns] for p in items]
            latent_BMd = model.encoder.with_hints(latent_BMd, lengths, drop=True)
        self.latent_BMd = latent_BMd.detach()
        self.bottleneck_loss_B: Tensor | None = None
        self.rate_B: Tensor | None = None
        if rate and bits is not None:
            self.rate_B = self._leaf(model.bottleneck.rate(latent_BMd, bits))
        self.sent_BMd = self._sent[contexts, questions] = self._send(latent_BMd, own=True)

    def sent(self, contexts: Texts, questions: Texts | None) -> Tensor:
        """Latents `[B, M, d]` of other texts as readers get them, encoded once for all readers."""
        key = contexts, questions
        if key not in self._sent:
            self._sent[key] = self._send(self._encode(contexts, questions))
        return self._sent[key]

    def pieces_of(self, contexts: Texts, questions: Texts | None) -> Pieces:
        """One latent for each of these texts, with as many vectors as the text gets."""
        counts = self.model.encoder.latent_counts(contexts, questions)
        return Pieces((1,) * len(contexts), counts)

    def _encode(self, contexts: Texts, questions: Texts | None) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._hold):
            return self.model.encode(contexts, questions)

    @property
    def positions(self) -> Selection:
        """The positions that the latents stand at, for objectives that need them."""
        assert self.selection is not None, "an objective without `needs_positions` asked for them"
        return self.selection

    def _send(self, latent_BMd: Tensor, *, own: bool = False) -> Tensor:
        """What readers get of latents.

        Args:
            own: they are those of the items, whose loss is kept.
        """
        if self._bits is not None:
            sent = self.model.bottleneck.send(latent_BMd, self._bits)
            if own and sent.loss_B is not None:
                self.bottleneck_loss_B = self._leaf(sent.loss_B)
            latent_BMd = sent.latent_BMd
        if self._dropout:
            kept_BM1 = torch.rand_like(latent_BMd[..., :1]) >= self._dropout
            latent_BMd = latent_BMd * kept_BM1
        return self._leaf(latent_BMd)

    def _leaf(self, value: Tensor) -> Tensor:
        """The value, or where the graph is cut a leaf in its place that collects its gradient."""
        if not (self._cut and value.requires_grad):
            return value
        leaf = value.detach().requires_grad_()
        self._cuts.append((value, leaf))
        return leaf

    def backward(self) -> None:
        """Backward through the encoder, with the gradients that all readers left at the cuts."""
        reached = [(value, leaf) for value, leaf in self._cuts if leaf.grad is not None]
        if reached:
            ends = [value for value, _ in reached]
            torch.autograd.backward(ends, [leaf.grad for _, leaf in reached])


@dataclass(frozen=True)
class AnswerPass:
    """A reader's forward pass over the answers behind the latents.

    Attributes:
        batch: the prompts that were read.
        hidden_ND: last hidden states at the positions that predict an answer's token.
        layers: hidden states at these positions of other layers, by number, as far as the stage's
            objectives compare them.
    """

    batch: PromptBatch
    hidden_ND: Tensor
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    def first_N(self, limit: int | None) -> Tensor:
        """Mask of the tokens within the first `limit` of their answer; None for all of them."""
        if limit is None:
            return torch.ones_like(self.batch.step_N, dtype=torch.bool)
        return self.batch.step_N < limit


@dataclass(frozen=True)
class AnswerTerm:
    """A loss over the answers' tokens behind the latents.

    Attributes:
        tokens: how many tokens of each answer count; None: all of them and EOS.
        tau: temperature of a distillation; None: the labels' cross-entropy.
        trained: whether its gradient is wanted.
        smoothing: share of each label that is spread evenly over all tokens.
    """

    tokens: int | None
    tau: float | None = None
    trained: bool = True
    smoothing: float = 0.0


class ReaderBatch:
    """One reader's view of a micro-batch: each part is computed when it is first asked for.

    Args:
        encoded: the items, with their latents.
        teacher: cache of what readers compute of texts; None computes it each time.
        terms: what the stage's objectives will ask `answer_losses` for.
        layers: numbers of the layers whose states they will ask for, behind latents and texts.
    """

    def __init__(
        self,
        encoded: EncodedBatch,
        reader: Reader,
        *,
        teacher: TeacherCache | None,
        terms: Sequence[AnswerTerm] = (),
        layers: Sequence[int] = (),
    ) -> None:
        self.encoded = encoded
        self.reader = reader
        self.model = encoded.model
        self._teacher = teacher
        self._terms = terms
        self._layers = layers
        self._losses: dict[AnswerTerm, LinearLosses] = {}
        self._reports: dict[str, Tensor] = {}

    @property
    def items(self) -> Sequence[PreparedItem]:
        """The items of the micro-batch."""
        return self.encoded.items

    def prompts(self, kind: str) -> list[Prompt]:
        """The items' prompts of one kind for this reader."""
        return [item.prompts[kind, self.reader.name] for item in self.items]

    @cached_property
    def inputs(self) -> ReaderInputs:
        """The reader's inputs in the place of the items' latents."""
        return self._inputs(self.encoded.sent_BMd, self.encoded.pieces)

    def _inputs(self, sent_BMd: Tensor, pieces: Pieces) -> ReaderInputs:
        absent_BM = pieces.absent_RM(sent_BMd.shape[1], device=sent_BMd.device)
        return self.model.reader_inputs(
            self.reader.name, sent_BMd, gain=self.encoded.gain, absent_BM=absent_BM
        )

    @cached_property
    def prompt_inputs(self) -> dict[str, Any]:
        """The same in the place of the items' texts, those of an item's latents one behind the
        other: arguments of `Reader.collate`."""
        return joined_inputs(self.inputs, self.encoded.pieces, reader=self.reader)

    def inputs_of(self, sent_BMd: Tensor, *, task: Task | None = None) -> ReaderInputs:
        """The reader's inputs in the place of latents; `task` as in `Interlingua`."""
        gain = self.encoded.gain
        return self.model.reader_inputs(self.reader.name, sent_BMd, gain=gain, task=task)

    def task_inputs(self, task: Task, sent_BMd: Tensor, pieces: Pieces) -> dict[str, Any]:
        """Inputs in the place of texts, those of a text's latents one behind the other, then a
        pretraining task's token: arguments of `Reader.collate`."""
        if pieces.is_single:
            return {**self.inputs_of(sent_BMd, task=task)}
        joined = joined_inputs(self._inputs(sent_BMd, pieces), pieces, reader=self.reader)
        token_1D = self.model.task_token(self.reader.name, task)[None]
        joined["prefixes"] = [torch.cat([soft, token_1D]) for soft in joined["prefixes"]]
        return joined

    @cached_property
    def answers(self) -> AnswerPass:
        """The forward pass over the answers behind the latents (prompts of kind `latent`)."""
        batch = self.reader.collate(self.prompts("latent"), **self.prompt_inputs)
        if not self._layers:
            return AnswerPass(batch, self.reader.target_hidden(batch))
        hidden_ND, states_KND = self.reader.target_layers(batch, self._layers)
        return AnswerPass(batch, hidden_ND, dict(zip(self._layers, states_KND, strict=True)))

    @cached_property
    def teacher_hidden_ND(self) -> Tensor:
        """The teacher: the reader's hidden states `[N, D]` at the answer tokens behind the text.

        Without gradient, and without low-rank updates; the prompts are those of kind `text`.
        """
        return self.hidden_of(self.reader)

    def hidden_of(self, teacher: Reader) -> Tensor:
        """The same of another LM, which reads the same prompts: hidden states `[N, D]`."""
        prompts = self.prompts("text")
        if self._teacher is not None:
            return self._teacher.hidden(teacher, prompts)
        if teacher is self.reader and self._layers:
            return self._text_pass[0]
        with torch.no_grad(), teacher.base():
            return teacher.target_hidden(teacher.collate(prompts))

    @cached_property
    def teacher_layers(self) -> Mapping[int, Tensor]:
        """The teacher's hidden states `[N, D]` there in other layers, by number."""
        if self._teacher is None:
            states_KND = self._text_pass[1]
        else:
            states_KND = self._teacher.layers(self.reader, self.prompts("text"), self._layers)
        return dict(zip(self._layers, states_KND, strict=True))

    @cached_property
    def _text_pass(self) -> tuple[Tensor, Tensor]:
        """One pass of the teacher for its last states and those of the layers that are asked for,
        where neither is kept on disk."""
        with torch.no_grad(), self.reader.base():
            read = self.reader.collate(self.prompts("text"))
            return self.reader.target_layers(read, self._layers)

    @cached_property
    def observation(self) -> Observation:
        """The reader's attention, keys and values on the items' texts: of `text` prompts, or of
        `context` prompts if there are none."""
        kind = "text" if self.reads_answers else "context"
        with self.reader.base():
            return observe(self.reader, self.prompts(kind))

    def attention_targets(self, questions: Sequence[AttentionQuestion]) -> Tensor:
        """What the reader's attention takes from texts, `[B, L, H, Q, 2 D + 1]`, fp32."""
        if self._teacher is not None:
            return self._teacher.attention(self.reader, questions)
        with self.reader.base():
            return attention_targets(self.reader, questions)

    def keys_values(self, places_BM: Tensor) -> Tensor:
        """The reader's keys and values `[L, 2, B, H, M, D]` at positions of the items' texts,
        turned to where a deep prefix stands."""
        first = self.inputs["head"]

        def compute() -> Tensor:
            return self.observation.keys_values(places_BM, first=first)

        if self._teacher is None or "observation" in vars(self):  # it has been read already
            return compute()
        prompts = self.prompts("text" if self.reads_answers else "context")
        return self._teacher.keys_values(
            self.reader, prompts, places_BM, first=first, compute=compute
        )

    @property
    def reads_answers(self) -> bool:
        """Whether the items' texts were read with their questions and answers."""
        return ("text", self.reader.name) in self.items[0].prompts

    def report(self, name: str, value: Tensor) -> None:
        """Report a further sum of the objective that is being computed, such as `accuracy`.

        It is divided by the objective's count, as its loss is.

        Args:
            value: 0-d, without gradient.
        """
        self._reports[name] = value

    def take_reports(self) -> dict[str, Tensor]:
        """The reports since the last call."""
        reports, self._reports = self._reports, {}
        return reports

    def cross_entropy(
        self, kind: str, inputs: Mapping[str, Any], *, trained: bool = True
    ) -> Tensor:
        """Cross-entropy summed over all target tokens of the prompts of one kind, 0-d.

        Args:
            trained: False for a loss that is only reported: it has no gradient then.
        """
        batch = self.reader.collate(self.prompts(kind), **inputs)
        hidden_ND = self.reader.target_hidden(batch)
        return self.reader.output_head.losses(
            hidden_ND, batch.labels_N, cross_entropy_gradient=trained
        ).cross_entropy

    def answer_losses(self, term: AnswerTerm) -> LinearLosses:
        """The losses of the answers' tokens behind the latents, summed, of which a term is one.

        A stage's cross-entropy and its distillation come from one pass over the head.
        """
        if term not in self._losses:
            waiting = (t for t in self._terms if t not in self._losses)
            partner = next((t for t in waiting if (t.tau is None) != (term.tau is None)), None)
            pair = (term, partner) if term.tau is None else (partner, term)
            losses = self._score(*pair)
            self._losses |= {t: losses for t in pair if t is not None}
        return self._losses[term]

    def _score(self, answer: AnswerTerm | None, kd: AnswerTerm | None) -> LinearLosses:
        masks = [None if t is None else self.answers.first_N(t.tokens) for t in (answer, kd)]
        scored_N = torch.stack([m for m in masks if m is not None]).any(0)
        counts = [None if m is None else m[scored_N] for m in masks]
        hidden_ND = self.answers.hidden_ND[scored_N]
        labels_N = self.answers.batch.labels_N[scored_N]
        return self.reader.output_head.losses(
            hidden_ND,
            None if answer is None else labels_N,
            label_weights=counts[0],
            cross_entropy_gradient=answer is not None and answer.trained,
            label_smoothing=0.0 if answer is None else answer.smoothing,
            teacher_hidden=(None if kd is None else self.teacher_hidden_ND[scored_N].to(hidden_ND)),
            kd_weights=counts[1],
            kd_gradient=kd is not None and kd.trained,
            tau=1.0 if kd is None or kd.tau is None else kd.tau,
        )
