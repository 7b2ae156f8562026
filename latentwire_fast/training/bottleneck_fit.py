"""The end of a training: the bottleneck learns how often its symbols come."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.streams import Stream
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.prepared import PreparedItem

logger = logging.getLogger(__name__)

_BATCH = 50


@torch.no_grad()
def fit_bottleneck(model: Interlingua, stream: Stream, config: RunConfig) -> None:
    """Fit the bottleneck of a trained model to the first training texts, as many as it wants. A
    text that comes again, as those of a finite data set do, is not read again. The model is in eval
    mode afterwards."""
    model.eval()
    start = time.perf_counter()
    texts = _texts(model, stream, config)
    parts = [texts[first : first + _BATCH] for first in range(0, len(texts), _BATCH)]
    bar = tqdm(parts, desc="texts for the prior", unit="batch", dynamic_ncols=True, disable=None)
    model.fit_bottleneck([_latents(model, part, config) for part in bar])
    seconds = time.perf_counter() - start
    logger.info("bottleneck fitted to %d texts in %.1f s", len(texts), seconds)


def _texts(model: Interlingua, stream: Stream, config: RunConfig) -> list[PreparedItem]:
    """What the encoder reads of the first training batches, each text once."""
    wanted = model.bottleneck.fits_texts
    found: dict[tuple[str, str | None], PreparedItem] = {}
    for first in range(0, wanted, _BATCH):
        items = stream.batch(
            first // _BATCH, _BATCH, facts=config.data.facts, texts=model.mode == "context"
        )
        for item in items[: wanted - first]:
            prepared = PreparedItem(item, model.mode)
            found.setdefault((item.context, prepared.question), prepared)
    return list(found.values())


def _latents(model: Interlingua, texts: Sequence[PreparedItem], config: RunConfig) -> Tensor:
    """The latents `[B, M, d]` of some texts, or of their chunks."""
    questions = [p.question for p in texts if p.question is not None] or None
    contexts = [p.item.context for p in texts]
    chunks = model.cut(contexts, questions, length=config.data.chunk_length)
    return model.encode(chunks.contexts, chunks.questions)
