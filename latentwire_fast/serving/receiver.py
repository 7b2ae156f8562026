"""The one way to read prompts and answer them: text, payloads, or embeddings.

    receiver = Receiver.of(model, reader)
    prompts = reader.prompts.build_many([Turn("Where does Nulnak live?")], latent=model.mode)
    receiver.generate(prompts, payloads=[payload])

On the CPU, and where a reader's layers are on several devices, a prefill runs op by op. On a CUDA
device it is one graph from the payload's codes to the logits, captured once for each shape of batch
(`graphs.py`). What cannot be captured is read op by op as well, with the same result: `engine` says
which it is, `reason` why. `docs/prefill.md` has the timings.

A prompt may be about several payloads (a long text in chunks, say): a list of them in the place of
one. A graph has one number of payloads for each row; rows with different numbers are read op by op.

Shapes: B rows, T columns of the padded prompts, R payloads, M latents, d latent width, D
`d_model`, V vocabulary; L layers, H key/value heads, P deep positions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.serving.batch import Batch, deep_positions
from latentwire_fast.serving.buckets import row_bucket
from latentwire_fast.serving.engines import choose_engine, choose_with_hooks
from latentwire_fast.serving.forward_pass import ForwardPass
from latentwire_fast.serving.graph_engine import GraphEngine
from latentwire_fast.serving.graphs import CapturedPass
from latentwire_fast.serving.intake import Intake
from latentwire_fast.serving.options import Engine, ReceiverOptions
from latentwire_fast.serving.pass_cache import PassCache
from latentwire_fast.serving.payload_batch import Message, PayloadKind
from latentwire_fast.serving.prefilled import Prefilled
from latentwire_fast.serving.prefilled_apart import PrefilledApart
from latentwire_fast.serving.prefixes import TrainedParts
from latentwire_fast.serving.prompt_head import PromptHeads

logger = logging.getLogger(__name__)


class Receiver:
    """Reads prompts with one reader.

    Any thread may call it. Receivers of one reader take turns (`Reader.lock`): a `generate` is one
    turn, so its cache is its own until its answers are there. Requests that come together are
    faster as one batch.

    Args:
        reader: on a device, frozen.
        adapter: latent `[R, M, d]` to soft tokens `[R, M, D]`, or as many as its `positions` says;
            None with a deep prefix only, and for text.
        payload_kind: of the payloads that the adapter was trained for; None for text.
        deep_prefix: latent to keys and values `[L, 2, R, H, P, d_head]`, P likewise; None without
            one.
        layers: latent to updates of the hidden states between the reader's layers, which are read
            op by op; None without any.
        options: see `ReceiverOptions`.

    Attributes:
        engine: what reads: `eager`, `compile` or `graph`.
        reason: why it is that one.
        passes: the graphs that were captured.

    Raises:
        ConfigError: neither adapter nor deep prefix, but payloads; parts on different devices; a
            reader that keeps something else than keys and values, whose layers are where nothing
            can be placed, or that cannot be read with the engine asked for.
    """

    def __init__(
        self,
        reader: Reader,
        adapter: nn.Module | None = None,
        *,
        payload_kind: PayloadKind | None = None,
        deep_prefix: nn.Module | None = None,
        layers: nn.Module | None = None,
        options: ReceiverOptions | None = None,
    ) -> None:
        self.reader = reader
        self.options = options = options or ReceiverOptions()
        self.engine: Engine
        choose = choose_engine if layers is None else choose_with_hooks
        self.engine, self.reason = choose(options.engine, reader)
        parts = None
        if payload_kind is not None:
            parts = TrainedParts(
                adapter,
                deep_prefix,
                layers,
                reader=reader,
                gain=options.prefix_gain,
                view=payload_kind.view,
            )
        self._pass = ForwardPass(
            reader, parts, compiled=self.engine == "compile", mark=options.mark
        )
        heads = None
        # A head that attends to the latent, too, is not the same from request to request.
        can_keep = deep_prefix is None and layers is None and not reader.abilities.deep
        if options.keep_head and can_keep:
            heads = PromptHeads(reader)
        self._intake = Intake(self._pass, payload_kind, heads)
        self._graphs = GraphEngine(self._pass, options) if self.engine == "graph" else None
        self.passes = PassCache[CapturedPass](0) if self._graphs is None else self._graphs.passes
        if self._graphs is not None and self._graphs.fault:
            self._leave_graphs()

    @classmethod
    def of(
        cls, model: Interlingua, reader: Reader, *, options: ReceiverOptions | None = None
    ) -> Receiver:
        """A receiver for what `model` encodes, and for text. The reader reads with its low-rank
        updates (LoRA) from now on, where the model has any for it; text too, but for what is read
        inside `reader.base()`.

        Raises:
            ConfigError, CheckpointError: `model` was not trained for this reader.
        """
        model.adapt(reader, merge=options is not None and options.merge_lora)
        return cls(
            reader,
            model.attachment(reader.name, "prefixes"),
            deep_prefix=model.attachment(reader.name, "deep"),
            layers=model.attachment(reader.name, "layers"),
            payload_kind=PayloadKind.of(model, reader.name),
            options=options,
        )

    @classmethod
    def for_text(cls, reader: Reader, *, options: ReceiverOptions | None = None) -> Receiver:
        """A receiver of text and of embeddings, which needs no trained model."""
        return cls(reader, options=options)

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[Message] | None = None,
        embeddings: Sequence[Tensor] | None = None,
    ) -> Prefilled:
        """Read prompts up to the first token's logits.

        Args:
            prompts: without their answers. Built with `latent=` where payloads or embeddings are
                given, as text where neither is.
            payloads: one per prompt, or one that all prompts ask about; all of one bit width. A
                list of payloads in the place of one: they stand one behind the other.
            embeddings: ready soft tokens `[M_i, D]` per prompt, in their place. They are always
                read op by op, and without a deep prefix.

        Raises:
            PayloadError: bytes that are no payload, or not one that this receiver was made for.
            ConfigError: counts that do not match, prompts of the other kind, tokens that the
                reader has not.
            DataError: more positions than the reader's table has.
        """
        with self.reader.lock:
            return self._prefill(prompts, payloads, embeddings)

    def _prefill(
        self,
        prompts: Sequence[Prompt],
        payloads: Sequence[Message] | None,
        embeddings: Sequence[Tensor] | None,
    ) -> Prefilled:
        batch = self._batch(prompts, payloads, embeddings)
        if len(prompts) > 1 and not batch.is_even:
            abilities = self.reader.abilities
            padded_first = "" if batch.deep_lengths_B is None else abilities.left
            if why := abilities.together or padded_first:
                return self._apart(prompts, payloads, embeddings, why)
        if self._graphs is not None and embeddings is None and batch.is_uniform:
            return self._with_graphs(batch) or self._read(batch)
        return self._read(batch)

    def _apart(
        self,
        prompts: Sequence[Prompt],
        payloads: Sequence[Message] | None,
        embeddings: Sequence[Tensor] | None,
        why: str,
    ) -> Prefilled:
        """Prompts of a reader that cannot decode several lengths in one batch, one by one."""
        self.reader.warn_once(
            "apart",
            f"reader {self.reader.name!r} reads prompts of several lengths one by one: {why}",
        )
        parts = []
        for row, prompt in enumerate(prompts):
            own = None if payloads is None else payloads[row if len(payloads) > 1 else 0]
            parts.append(
                self.prefill(
                    [prompt],
                    payloads=None if own is None else [own],
                    embeddings=None if embeddings is None else [embeddings[row]],
                )
            )
        return PrefilledApart(self.reader, parts)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[Message] | None = None,
        embeddings: Sequence[Tensor] | None = None,
        options: DecodeOptions | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt: `prefill`, then `Prefilled.generate`. Theirs are the
        arguments and errors."""
        with self.reader.lock:  # one request: no other comes between its two steps
            first = self.prefill(prompts, payloads=payloads, embeddings=embeddings)
            return first.generate(options, numbers=numbers)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[Message] | None = None,
        embeddings: Sequence[Tensor] | None = None,
    ) -> TargetScores:
        """Log-probabilities of the answers that the prompts end in, in one teacher-forced pass.

        Arguments and errors as of `prefill`; it always runs op by op.
        """
        with self.reader.lock:
            return self._score(prompts, self._batch(prompts, payloads, embeddings))

    def _score(self, prompts: Sequence[Prompt], batch: Batch) -> TargetScores:
        if batch.parcel is None:
            return self.reader.score(prompts, prefixes=batch.embeddings)
        return self.reader.score(prompts, **self._pass.reader_inputs(batch))

    @torch.no_grad()
    def capture(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[Message] | None = None,
        rows: Sequence[int] = (1,),
        shared: bool = False,
    ) -> int:
        """Capture graphs before the first request comes. Later, what none of them serves is
        captured when it comes, and has to wait for that.

        Args:
            prompts: examples of what will be read: of each length that will come, and so of
                whatever kind.
            payloads: of the precision that will come, one per prompt or one for all of these; None
                for text.
            rows: the sizes of batch that will come.
            shared: whether all prompts of a batch will ask about one payload.

        Returns:
            How many were captured. 0 where all are there, or where this receiver captures none.

        Raises:
            As `prefill`.
        """
        before = self.passes.captures
        with self.reader.lock:
            for number, prompt in enumerate(prompts):
                own = [] if payloads is None else [payloads[number if len(payloads) > 1 else 0]]
                for count in sorted({row_bucket(size) for size in rows}):
                    given = own if shared else own * count
                    batch = self._batch([prompt] * count, given or None, None)
                    batch.verify()
                    self._capture(batch)
        return self.passes.captures - before

    def _capture(self, batch: Batch) -> None:
        if self._graphs is None:
            return
        lengths_B, positions = self._places(batch)
        if not self._graphs.capture(batch, lengths_B=lengths_B, positions=positions):
            self._leave_graphs()

    def _batch(
        self,
        prompts: Sequence[Prompt],
        payloads: Sequence[Message] | None,
        embeddings: Sequence[Tensor] | None,
    ) -> Batch:
        return self._intake.batch(prompts, payloads, embeddings, padded=self.engine != "eager")

    # --- engines ----------------------------------------------------------------------------------

    def _read(self, batch: Batch) -> Prefilled:
        logits_BV, cache, layers = self._pass.run(batch)
        return self._outcome(batch, logits_BV, cache=cache, layers=layers)

    def _with_graphs(self, batch: Batch) -> Prefilled | None:
        """None where the engine was left to the receiver, and a capture fails."""
        assert self._graphs is not None
        found = self._graphs.read(batch)
        if found is None:
            self._leave_graphs()
            return None
        logits_BV, cache, captured = found
        return self._outcome(batch, logits_BV, cache=cache, captured=captured)

    def _leave_graphs(self) -> None:
        """Read op by op from now on."""
        assert self._graphs is not None
        self.engine, self.reason, self._graphs = "eager", self._graphs.fault, None
        logger.warning("reader %r is read op by op from now on: %s", self.reader.name, self.reason)

    def _outcome(
        self,
        batch: Batch,
        logits_BV: Tensor,
        *,
        cache: Cache,
        captured: CapturedPass | None = None,
        layers: LayerUpdates | None = None,
    ) -> Prefilled:
        lengths_B, positions = self._places(batch)
        step = None
        if captured is not None and self._graphs is not None:
            step = partial(self._graphs.step, captured, lengths_B=lengths_B, positions=positions)
        return Prefilled(
            self.reader,
            logits_BV,
            cache=cache,
            lengths_B=lengths_B,
            positions=positions,
            padding_B=batch.layout.width - batch.layout.lengths_B,
            captured=captured,
            layers=layers,
            step=step,
        )

    def _places(self, batch: Batch) -> tuple[np.ndarray, int]:
        """Real positions of each row, and columns of the cache, deep ones included."""
        deep = deep_positions(batch.parcel, batch.head, batch.spans)
        deep_B = deep if batch.deep_lengths_B is None else batch.deep_lengths_B
        return batch.layout.lengths_B + deep_B, deep + batch.layout.width
