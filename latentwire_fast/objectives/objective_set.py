"""What is learned: answer cross-entropy, autoencoding, continuation, an answer's embeddings, and
distillation from the text: of predictions, of keys and values, and of where answers look.

A batch is prepared first (prompts, token counts), then its losses are computed part by part, each a
*sum* over tokens divided by the whole batch's count. So a batch may be cut into micro-batches or
spread over processes without changing its gradient. Shapes: N scored tokens, D `d_model`, V
vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast import ops
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.streams import TrainItem
from latentwire_fast.models.attachments.base import ReaderInputs
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.objectives.token_alignment import move_attention, move_places
from latentwire_fast.prompts.batch import PromptBatch
from latentwire_fast.prompts.builder import Prompt, encoded_text, replaced_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.trace import observe

Objective = Literal["answer", "autoencode", "continue", "select", "kv", "embed", "kd"]
Key = tuple[Objective, str]  # (objective, reader name)


@dataclass
class Work:
    """One training item with every prompt its stage needs, and how many tokens each is scored
    on."""

    item: TrainItem
    prompts: dict[Key, Prompt] = field(default_factory=dict)
    counts: Counter[Key] = field(default_factory=Counter)
    half: str = ""  # first half of the context, what the continuation latent encodes


@dataclass
class Losses:
    """Results of one micro-batch.

    Attributes:
        total: the scalar to differentiate; already divided by the batch's counts.
        sums: per key, the plain sum over tokens.
        right: per reader, answer tokens predicted right (arg max, teacher forced).
        latent_BMd: the unquantised latents of the items (detached).
    """

    total: Tensor
    sums: dict[Key, Tensor]
    right: dict[str, Tensor]
    latent_BMd: Tensor


def halves(text: str) -> tuple[str, str]:
    """A text cut at the word nearest to its middle."""
    words = text.split()
    middle = max(1, len(words) // 2)
    return " ".join(words[:middle]), " ".join(words[middle:])


def _scored(prompt: Prompt, limit: int | None) -> int:
    """Target tokens of a prompt that count when only the first `limit` of each answer do."""
    total = step = 0
    for is_target in prompt.is_target:
        step = step + 1 if is_target else 0
        total += is_target and (limit is None or step <= limit)
    return total


class Objectives:
    """Prepares and computes the losses of one stage.

    Args:
        readers: frozen readers by name.
        teacher: cache of the text-prompted teacher's hidden states; None computes them each time.
    """

    def __init__(
        self,
        model: Interlingua,
        readers: Mapping[str, Reader],
        *,
        teacher: TeacherCache | None = None,
    ) -> None:
        self.model = model
        self.readers = readers
        self.teacher = teacher

    def prepare(
        self, items: Sequence[TrainItem], stage: StageConfig, active: Iterable[str]
    ) -> list[Work]:
        """Prompts and token counts for the active readers."""
        active = list(active)
        works = []
        for item in items:
            work = Work(item)
            pure = self.model.mode == "pure"
            work.half, rest = halves(item.context)
            question = item.turns[0].question
            encoded = replaced_text(item.context, question, mode=self.model.mode)
            for name in active:
                builder = self.readers[name].prompts
                if stage.answer or stage.kd:
                    prompt = builder.build(item.turns, context=item.context, latent=self.model.mode)
                    self._add(work, ("answer", name), prompt, stage.answer_tokens)
                    if stage.kd:
                        taught = builder.build(item.turns, context=item.context)
                        self._add(work, ("kd", name), taught, stage.answer_tokens)
                if stage.autoencode:
                    self._add(work, ("autoencode", name), builder.build_rebuild(encoded), None)
                if stage.continuation:
                    self._add(work, ("continue", name), builder.build_rebuild(rest), None)
                if stage.select or stage.kv:
                    # Without answers that look, a third of the tokens: the text itself.
                    asked = pure or stage.select
                    read = (
                        builder.build(item.turns, context=item.context)
                        if asked
                        else builder.build_context(item.context)
                    )
                    work.prompts["kv", name] = read
                    work.counts["select", name] = work.counts["kv", name] = 1
                if stage.embed:
                    slots = self.model.encoder_config.latents
                    answer = Prompt()
                    answer.add(builder.target_ids(item.turns[0].answer or "")[:slots], target=True)
                    self._add(work, ("embed", name), answer, None)
            works.append(work)
        return works

    @staticmethod
    def _add(work: Work, key: Key, prompt: Prompt, limit: int | None) -> None:
        work.prompts[key] = prompt
        work.counts[key] = _scored(prompt, limit)

    @staticmethod
    def counts(works: Iterable[Work]) -> Counter[Key]:
        """Scored tokens of a whole batch per key."""
        return sum((w.counts for w in works), Counter())

    def compute(
        self, works: Sequence[Work], stage: StageConfig, counts: Mapping[Key, int]
    ) -> Losses:
        """Losses of some of a batch's items, normalised by the whole batch's `counts`."""
        contexts = [w.item.context for w in works]
        questions = None
        if self.model.mode == "pure":
            questions = [w.item.turns[0].question for w in works]
        selection = None
        if stage.select or stage.kv:
            latent, selection = self.model.select(contexts, questions)
        else:
            latent = self.model.encode(contexts, questions)
        sent = latent if stage.quantize is None else self.model.quantize(latent, stage.quantize)
        half = None
        if stage.continuation:
            blank = None if questions is None else [""] * len(works)
            half = self.model.encode([w.half for w in works], blank)
            half = half if stage.quantize is None else self.model.quantize(half, stage.quantize)
        weights = {
            "answer": stage.answer,
            "autoencode": stage.autoencode,
            "continue": stage.continuation,
            "select": stage.select,
            "kv": stage.kv,
            "embed": stage.embed,
            "kd": stage.kd,
        }
        losses = Losses(latent.new_zeros(()), {}, {}, latent.detach())
        for name in sorted({name for w in works for _, name in w.prompts}):
            if ("answer", name) in works[0].prompts:
                self._answer(works, name, sent, stage, losses)
            if stage.autoencode:
                given = self.model.reader_inputs(name, sent, task="autoencode")
                self._rebuild(works, ("autoencode", name), given, losses)
            if half is not None:
                given = self.model.reader_inputs(name, half, task="continue")
                self._rebuild(works, ("continue", name), given, losses)
            if stage.embed:
                self._embed(works, name, sent, losses)
            if selection is not None:
                self._observe(works, name, selection, sent, stage, losses)
        for key, value in losses.sums.items():
            if weights[key[0]]:
                losses.total = losses.total + weights[key[0]] * value / max(1, counts[key])
        return losses

    def _answer(
        self,
        works: Sequence[Work],
        name: str,
        latent: Tensor,
        stage: StageConfig,
        losses: Losses,
    ) -> None:
        """Cross-entropy over the answers and, if asked, distillation at the same positions."""
        reader = self.readers[name]
        prompts = [w.prompts["answer", name] for w in works]
        batch = reader.collate(prompts, **self.model.reader_inputs(name, latent))
        hidden_ND = reader.target_hidden(batch)
        keep_N = _keep(batch, stage.answer_tokens)
        logits_NV = reader.head(hidden_ND[keep_N]).float()
        labels_N = batch.labels_N[keep_N]
        losses.sums["answer", name] = F.cross_entropy(logits_NV, labels_N, reduction="sum")
        losses.right[name] = (logits_NV.detach().argmax(-1) == labels_N).sum()
        if stage.kd:
            texts = [w.prompts["kd", name] for w in works]
            teacher_ND = self._teacher_hidden(reader, texts)
            losses.sums["kd", name] = ops.linear_kd_kl(
                hidden_ND[keep_N],
                teacher_ND[keep_N].to(hidden_ND),
                reader.head_weight,
                tau=stage.kd_tau,
                reduction="sum",
            )

    def _rebuild(
        self, works: Sequence[Work], key: Key, given: ReaderInputs, losses: Losses
    ) -> None:
        reader = self.readers[key[1]]
        batch = reader.collate([w.prompts[key] for w in works], **given)
        logits_NV = reader.head(reader.target_hidden(batch)).float()
        losses.sums[key] = F.cross_entropy(logits_NV, batch.labels_N, reduction="sum")

    def _embed(self, works: Sequence[Work], name: str, latent: Tensor, losses: Losses) -> None:
        """The first soft tokens against the reader's embeddings of the answer and its EOS."""
        reader = self.readers[name]
        answers = [w.prompts["embed", name].ids for w in works]
        places = [(b, m) for b, ids in enumerate(answers) for m in range(len(ids))]
        rows_N, slots_N = torch.tensor(places, device=latent.device).unbind(1)
        ids_N = torch.tensor([i for ids in answers for i in ids], device=reader.device)
        target_ND = reader.embedding(ids_N).to(latent)
        soft_BMD = self.model.prefix(name, latent)
        error_ND = (soft_BMD[rows_N, slots_N] - target_ND) / reader.embedding_rms
        losses.sums["embed", name] = error_ND.pow(2).mean(-1).sum()

    def _observe(
        self,
        works: Sequence[Work],
        name: str,
        selection: Selection,
        latent: Tensor,
        stage: StageConfig,
        losses: Losses,
    ) -> None:
        """Scores against where the reader's answers look, and a deep prefix against what the
        reader holds at the chosen positions."""
        reader, encoder = self.readers[name], self.model.encoder
        pure = self.model.mode == "pure"
        places = []
        for work in works:
            context, question = work.item.context, work.item.turns[0].question
            asked = pure or stage.select
            text = encoded_text(context, question if asked else None)
            own = encoder.text_ends(context, question if pure else None)
            places.append((own, reader.prompts.text_ends(text)))
        seen = observe(reader, [w.prompts["kv", name] for w in works])
        start = reader.prompts.content_start
        if stage.select:
            looks_BT = move_attention(seen.attention_BT[:, start:], places, selection.scores_BT)
            losses.sums["select", name] = F.cross_entropy(
                selection.scores_BT.clamp(min=-1e9), looks_BT, reduction="sum"
            )
        if not stage.kv:
            return
        own_BM = start + move_places(selection.places_BM, places)
        kept = seen.keys_values(own_BM)
        made = cast(Tensor, self.model.deep_prefix(name, latent))
        rms_L2 = torch.tensor(self.model.cards[name].kv.rms, device=kept.device)
        error = (made - kept) / rms_L2[:, :, None, None, None, None]
        losses.sums["kv", name] = error.pow(2).mean((0, 1, 3, 4, 5)).sum()

    def _teacher_hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> Tensor:
        if self.teacher is not None:
            return self.teacher.hidden(reader, prompts)
        with torch.no_grad():
            return reader.target_hidden(reader.collate(prompts))


def _keep(batch: PromptBatch, limit: int | None) -> Tensor:
    """Mask `[N]` of the scored tokens within the first `limit` of their answer."""
    if limit is None:
        return torch.ones_like(batch.step_N, dtype=torch.bool)
    return batch.step_N < limit
