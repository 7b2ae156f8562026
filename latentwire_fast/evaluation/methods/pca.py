"""Principal components of a reader's own embeddings: the latent that needs no training.

Each of M spans of the text is the mean of its tokens' embeddings, written in the first `d_z`
principal components of the embeddings of training texts. These latents go through the run's
bottleneck; what comes out, back in the reader's embeddings, are its soft tokens. The reader has not
learned to read them.

Shapes: B texts, T tokens, M latents, d `d_z`, k components (at most the reader's width D).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    turns,
)
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.principal_axes import Moments, PrincipalAxes
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.readers.reader import Reader

BATCH = 4096  # embeddings that are looked up at a time


class PCA(EvaluationMethod):
    """Spans of the reader's own embeddings, as so many principal components as a latent has values.

    Measured where the run asks for it (`evaluation.pca_texts`).
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "PCA", "budget"
    note = "principal components of the reader's embeddings; nothing is trained"
    sends = "payload"
    is_optional = True

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._axes: dict[str, PrincipalAxes] = {}

    def fits(self, case: EvaluationCase) -> bool:
        """Where there are texts to fit to, and the reader takes soft tokens."""
        return bool(case.training_texts) and not case.reader.abilities.soft

    def facts(self, case: EvaluationCase) -> dict[str, float]:
        """What the components hold of the variance of the training texts' embeddings."""
        return {"explained_variance": float(self._axes_of(case).shares_k.sum())}

    @torch.no_grad()
    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """Soft tokens in the latent's place."""
        examples, reader = [case.examples[i] for i in rows], case.reader
        texts = [replaced_text(e.context, e.question, mode=case.mode) for e in examples]
        axes, shape = self._axes_of(case), case.model.encoder_config
        size = axes.variances_k.mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        spans = torch.stack([_spans(reader, text, shape.latents) for text in texts])
        values_BMk = (spans - axes.mean_D) @ axes.axes_kD.T / size
        latent_BMd = F.pad(values_BMk, (0, shape.d_z - values_BMk.shape[-1]))
        received_BMd = case.model.decode_payloads(case.model.payloads(latent_BMd, bits=bits))
        received_BMk = received_BMd[..., : len(axes.axes_kD)].to(axes.axes_kD)
        soft_BMD = received_BMk * size @ axes.axes_kD + axes.mean_D
        prompts = [
            reader.prompts.build(turns(e), context=e.context, latent=case.mode) for e in examples
        ]
        embeddings = [*soft_BMD.to(reader.embedding.weight.dtype)]
        return MethodInput(prompts, [shape.latents] * len(prompts), embeddings=embeddings)

    def _axes_of(self, case: EvaluationCase) -> PrincipalAxes:
        reader, count = case.reader, case.model.encoder_config.d_z
        if reader.name not in self._axes:
            axes = fit(reader, case.training_texts, min(count, reader.d_model))
            self._axes[reader.name] = axes
        return self._axes[reader.name]


@torch.no_grad()
def fit(reader: Reader, texts: Sequence[str], count: int) -> PrincipalAxes:
    """The first `count` principal axes of the embeddings of these texts' tokens.

    Raises:
        DataError: the texts have too few.
    """
    ids = Counter(i for text in texts for i in reader.prompts.text_ids(text))
    distinct, times = torch.tensor(sorted(ids)), torch.tensor([ids[i] for i in sorted(ids)])
    moments = Moments(reader.d_model, device=reader.device)
    for part, often in zip(distinct.split(BATCH), times.split(BATCH), strict=True):
        moments.add(reader.embedding(part.to(reader.device)), often)
    return moments.axes(count)


def _spans(reader: Reader, text: str, spans: int) -> Tensor:
    """Means `[M, D]` of the embeddings of spans of a text, fp32; zeros of a text without tokens."""
    ids_T = torch.tensor(reader.prompts.text_ids(text), dtype=torch.long, device=reader.device)
    embeds_TD = reader.embedding(ids_T).float()
    inside_1T = torch.ones_like(ids_T, dtype=torch.bool)[None]
    return span_weights(inside_1T, spans)[0].float() @ embeds_TD
