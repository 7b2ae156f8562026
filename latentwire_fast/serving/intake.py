"""Requests to batches: prompts and what stands in the place of their latents, checked, laid out.

Shapes: see `receiver.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.serving.batch import Batch, Spans, deep_positions
from latentwire_fast.serving.buckets import width_bucket
from latentwire_fast.serving.forward_pass import ForwardPass
from latentwire_fast.serving.input_buffer import lay_out
from latentwire_fast.serving.payload_batch import Message, Parcel, PayloadKind
from latentwire_fast.serving.prompt_head import Head, PromptHeads


class Intake:
    """Makes a receiver's batches.

    Args:
        kind: of its payloads; None where it reads text only.
        heads: what it keeps of prompts; None where it keeps nothing.
    """

    def __init__(
        self, forward_pass: ForwardPass, kind: PayloadKind | None, heads: PromptHeads | None
    ) -> None:
        self.reader = forward_pass.reader
        self._pass, self._kind, self._heads = forward_pass, kind, heads

    def batch(
        self,
        prompts: Sequence[Prompt],
        payloads: Sequence[Message] | None,
        embeddings: Sequence[Tensor] | None,
        *,
        padded: bool,
    ) -> Batch:
        """Everything checked that can be without the values of the payloads.

        Args:
            prompts, payloads, embeddings: of `Receiver.prefill`, whose errors these are.
            padded: whether to one of a few widths; embeddings never are.
        """
        parcel = self._open(payloads, len(prompts), with_embeddings=embeddings is not None)
        if embeddings is not None:
            self._check_embeddings(embeddings, len(prompts))
        soft: int | list[int] | None = None
        spans = Spans()
        head = self._head(prompts) if parcel is not None else None
        if parcel is not None:
            spans = self._pass.spans(parcel)
            sizes = parcel.pieces.sizes(spans.soft) if spans.soft else [0]
            soft = sizes[0] if len(sizes) == 1 else sizes
            before = self._pass.head_positions if head is None else len(head.ids)
            prompts = [prompt.behind(before) for prompt in prompts]
        elif embeddings is not None:
            soft = [len(embedding) for embedding in embeddings]
        deep = deep_positions(parcel, head, spans)
        # Padding has positions too: a table of them has no more rows.
        most = self.reader.max_positions - deep if self.reader.learns_positions else None
        layout = lay_out(
            prompts,
            soft_tokens=soft,
            pad_id=self.reader.pad_id,
            width_of=width_bucket if padded and embeddings is None else None,
            most=most,
        )
        largest, vocabulary = int(layout.ids_BT.max()), self.reader.embedding.num_embeddings
        if largest >= vocabulary:  # on a GPU the error would come too late to say where from
            raise ConfigError(
                f"a prompt has token {largest}, and reader {self.reader.name!r} knows {vocabulary} "
                "of them; build it with that reader's `prompts`"
            )
        self.reader.check_positions(deep + int(layout.lengths_B.max()))
        return Batch(layout, parcel, head, embeddings, spans)

    def _head(self, prompts: Sequence[Prompt]) -> Head | None:
        """What is kept of these prompts, if anything."""
        lora = self.reader.lora
        if self._heads is None or (lora is not None and not lora.merged):
            return None
        return self._heads.of(prompts)

    def _open(
        self, payloads: Sequence[Message] | None, prompts: int, *, with_embeddings: bool
    ) -> Parcel | None:
        if payloads is None:
            return None
        if with_embeddings:
            raise ConfigError("both payloads and embeddings are given; give one of them")
        if self._kind is None:
            raise ConfigError(
                f"this receiver of reader {self.reader.name!r} reads text only; make one with "
                "`Receiver.of(model, reader)` for payloads"
            )
        parcel = self._kind.open(payloads)
        if len(payloads) not in (1, prompts):
            raise ConfigError(
                f"{len(payloads)} payloads for {prompts} prompts; give one for each, or one for "
                "all of them (several for one prompt: a list in the place of a payload)"
            )
        return parcel

    def _check_embeddings(self, embeddings: Sequence[Tensor], prompts: int) -> None:
        if len(embeddings) != prompts:
            raise ConfigError(
                f"{len(embeddings)} embeddings for {prompts} prompts; give one for each"
            )
        for number, embedding in enumerate(embeddings):
            if embedding.dim() != 2 or embedding.shape[1] != self.reader.d_model:
                raise ConfigError(
                    f"embedding {number} is {list(embedding.shape)}, and reader "
                    f"{self.reader.name!r} takes [M, {self.reader.d_model}]"
                )
