"""The end of a training: the bottleneck learns how often its symbols come."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.streams import Stream
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.prepared import PreparedItem

logger = logging.getLogger(__name__)

_BATCH = 50


@torch.no_grad()
def fit_bottleneck(model: Interlingua, stream: Stream, config: RunConfig) -> None:
    """Fit the bottleneck of a trained model to the first training texts, as many as it wants; a
    finite data set may have fewer, which then come more than once. The model is in eval mode
    afterwards."""
    model.eval()
    start, texts = time.perf_counter(), model.bottleneck.fits_texts
    latents = [
        _latents(model, stream, number, config, texts=min(_BATCH, texts - number * _BATCH))
        for number in range(-(-texts // _BATCH))
    ]
    model.fit_bottleneck(latents)
    seconds = time.perf_counter() - start
    logger.info("bottleneck fitted to %d texts in %.1f s", texts, seconds)


def _latents(
    model: Interlingua, stream: Stream, number: int, config: RunConfig, *, texts: int
) -> Tensor:
    """The latents `[B, M, d]` of the first texts of one training batch, or of their chunks."""
    items = stream.batch(number, _BATCH, facts=config.data.facts, texts=model.mode == "context")
    prepared = [PreparedItem(item, model.mode) for item in items[:texts]]
    questions = [p.question for p in prepared if p.question is not None] or None
    contexts = [p.item.context for p in prepared]
    chunks = model.cut(contexts, questions, length=config.data.chunk_length)
    return model.encode(chunks.contexts, chunks.questions)
