"""Token ends of a micro-batch's texts, as its encoder and as a reader cut them."""

from __future__ import annotations

from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.token_alignment import Ends
from latentwire_fast.prompts.builder import encoded_text


def token_ends(batch: ReaderBatch) -> Ends:
    """Per text, the character behind each token: of the encoder's, and of the reader's that
    `batch.observation` is of."""
    encoder = batch.model.encoder
    ends = []
    for prepared in batch.items:
        context, question = prepared.item.context, prepared.item.question
        text = encoded_text(context, question if batch.reads_answers else None)
        own = encoder.text_ends(context, prepared.question)
        ends.append((own, batch.reader.prompts.text_ends(text)))
    return ends
