"""The engine that reads by replaying graphs: which there are, and which one a batch gets.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.serving.batch import Batch
from latentwire_fast.serving.buckets import row_bucket, width_bucket
from latentwire_fast.serving.decode_step import DecodeStep
from latentwire_fast.serving.engines import refusal, why_no_step
from latentwire_fast.serving.forward_pass import ForwardPass
from latentwire_fast.serving.graphs import CapturedPass, CapturedStep, GraphMemory
from latentwire_fast.serving.input_buffer import lay_out
from latentwire_fast.serving.options import ReceiverOptions, unmarked
from latentwire_fast.serving.pass_cache import PassCache, memory_for_graphs
from latentwire_fast.serving.static_cache import first_rows

logger = logging.getLogger(__name__)


class GraphEngine:
    """Captures passes and their decoding steps when they are first asked for, and replays them.

    Raises:
        ConfigError: graphs were asked for, and none can be made.

    Attributes:
        passes: the prefills that were captured.
        fault: of a capture that failed, perhaps of the one that is tried first; after that nothing
            is read with graphs.
        no_step: why tokens are decoded op by op behind them; None where a graph decodes them.
    """

    def __init__(self, forward_pass: ForwardPass, options: ReceiverOptions) -> None:
        self._pass, self._options = forward_pass, options
        reader = forward_pass.reader
        limit = options.graph_bytes or memory_for_graphs(reader.device)
        self.passes: PassCache[CapturedPass] = PassCache(limit)
        self.fault = ""
        self.no_step: str | None = why_no_step(reader)
        self._device = reader.device
        self._memory = GraphMemory(reader.device)
        self._try_out()

    def _try_out(self) -> None:
        """Capture a pass over a few tokens and a step behind it, and drop both. What a capture
        forbids (a value that is read on the host, say) shows in nothing else."""
        reader = self._pass.reader
        ids = [(7 * number + 3) % reader.vocabulary for number in range(width_bucket(1))]
        layout = lay_out([Prompt(ids)], soft_tokens=None, pad_id=reader.pad_id)
        trial = ForwardPass(reader, None, compiled=False, mark=unmarked)
        with torch.cuda.device(self._device):
            try:
                captured = trial.capture(Batch(layout), new_tokens=1, memory=self._memory)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a capture fails in all kinds of ways
                self.fault = f"a capture failed: {error}"
                if self._options.engine != "auto":
                    raise refusal(reader, "run as a CUDA graph", self.fault) from error
                return
        self.step(captured, lengths_B=layout.lengths_B, positions=layout.width)

    def read(self, batch: Batch) -> tuple[Tensor, StaticCache, CapturedPass] | None:
        """Logits `[B, V]` of the next token, the cache behind the prompts, and what made both. None
        where the engine was left to the receiver, and a capture fails.

        Raises:
            PayloadError: values that no encoder sends.
        """
        rows = len(batch.layout.ids_BT)
        padded = batch.with_rows(row_bucket(rows))
        with torch.cuda.device(self._device):
            captured = self._captured(padded)
            if captured is None:
                return None
            captured.fill(padded.values())
            self._options.mark("parse")
            logits_BV = captured.replay()[:rows]
            batch.verify()  # while the GPU works; nothing is handed out before
        cache = captured.cache if padded is batch else first_rows(captured.cache, rows)
        return logits_BV, cache, captured

    def capture(self, batch: Batch, *, lengths_B: np.ndarray, positions: int) -> bool:
        """Capture what a batch needs, the decoding step too; whether that worked.

        Args:
            lengths_B, positions: see `step`.
        """
        with torch.cuda.device(self._device):
            captured = self._captured(batch.with_rows(row_bucket(len(batch.layout.ids_BT))))
        if captured is not None:
            self.step(captured, lengths_B=lengths_B, positions=positions)
        return captured is not None

    def step(
        self, captured: CapturedPass, *, lengths_B: np.ndarray, positions: int
    ) -> Callable[[Tensor], Tensor] | None:
        """The decoding step behind a pass, started: tokens `[B]` to the logits `[B, V]` of those
        after them. None where tokens are decoded op by op.

        Args:
            lengths_B: positions of each row, the deep ones included.
            positions: of the cache that the prompts take, padding included.
        """
        if self.no_step is not None:
            return None
        with torch.cuda.device(self._device):
            if captured.step is None:
                step = DecodeStep(self._pass.reader, captured.cache)
                step.start(lengths_B, columns=positions)
                try:
                    captured.step = CapturedStep(step, memory=self._memory)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self.no_step = f"a capture failed: {error}"
                    name = self._pass.reader.name
                    logger.warning("reader %r decodes op by op: %s", name, self.no_step)
                    return None
            captured.step.start(lengths_B, columns=positions)
        run = captured.step.run

        def read(token_B: Tensor) -> Tensor:
            with torch.cuda.device(self._device):
                return run(token_B)

        return read

    def _captured(self, batch: Batch) -> CapturedPass | None:
        options = self._options
        try:
            return self.passes.get(
                batch.shape,
                lambda: self._pass.capture(
                    batch, new_tokens=options.new_tokens, memory=self._memory
                ),
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if options.engine != "auto":
                raise
            self.fault = f"a capture failed: {error}"
            return None
