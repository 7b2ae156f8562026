"""The result of a prefill: the first token's logits, and a cache to decode from.

Shapes: B rows, T columns of the padded prompts, P deep positions before them, N columns of the
cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.decoding import DecodeOptions, pick_tokens
from latentwire_fast.readers.decoding_cache import (
    keeps_states,
    move_right,
    tensors_of,
    without_first,
    without_limit,
)
from latentwire_fast.readers.layer_updates import updated_layers
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.graphs import CapturedPass
from latentwire_fast.serving.static_cache import set_length
from latentwire_fast.serving.streams import Finished


class Prefilled:
    """A batch of prompts that were read.

    Attributes:
        logits_BV: of the first new token.
        positions: P + T, how many columns the cache holds. Where a prompt is shorter than the
            longest, some of its columns are padding, which `generate` masks out: at the row's end
            in a graph's static cache, otherwise at its start (see `move_right`).

    Args:
        cache: of the padded prompts and what is before them, padding at the end of each row.
        lengths_B: real positions of each row, the deep ones included.
        positions: see above.
        padding_B: at each row's end. Before its deep prefix there may be more.
        captured: the graph that made it, if one did, and that owns the cache.
        layers: what changes the hidden states between the reader's layers, for each new token too.
        step: starts the graph that decodes from that cache, and gives what reads a token of each
            row with it, where there is one.
    """

    def __init__(
        self,
        reader: Reader,
        logits_BV: Tensor,
        *,
        cache: Cache,
        lengths_B: np.ndarray,
        positions: int,
        padding_B: np.ndarray,
        captured: CapturedPass | None,
        layers: LayerUpdates | None = None,
        step: Callable[[], Callable[[Tensor], Tensor] | None] | None = None,
    ) -> None:
        self.logits_BV = logits_BV
        self.positions = positions
        self._reader = reader
        self._cache = cache
        self._lengths_B = lengths_B
        self._captured = captured
        self._layers = layers
        self._step = step
        self._finished = Finished([logits_BV, *tensors_of(cache)])
        self._serial = captured.serial if captured else 0
        self._padded_right = isinstance(cache, StaticCache)
        self._padding_B = padding_B
        self._moved = self._padded_right or not self._padding_B.any()

    @property
    def cache(self) -> Cache:
        """The keys and values of the prompts, and of nothing after them.

        The current streams wait for the prefill, and the next one that uses the same memory waits
        for what they do with it until then.

        Raises:
            ConfigError: a later prefill of the same shape took the memory.
        """
        with self._reader.lock:
            return self._own_cache()

    def _own_cache(self) -> Cache:
        if self._captured is not None and self._captured.serial != self._serial:
            raise ConfigError(
                "a later prefill of the same shape has overwritten this one's keys and values; "
                "decode each prefill before the next, or use one receiver for each"
            )
        if self._captured is not None:
            self._captured.lend()
        self._finished.hand_over([self.logits_BV, *tensors_of(self._cache)])
        if not self._moved:  # only now: a first token does not need it
            move_right(cast(DynamicCache, self._cache), self._padding_B.tolist())
            self._moved = True
        if isinstance(self._cache, StaticCache):
            set_length(self._cache, self.positions)
        elif keeps_states(self._cache):
            return deepcopy(self._cache)  # decoding changes states, and nothing takes that back
        else:
            extra = int(self._cache.get_seq_length()) - self.positions
            if extra:
                cast(DynamicCache, self._cache).crop(-extra)
        return self._cache

    @torch.no_grad()
    def generate(
        self, options: DecodeOptions | None = None, *, numbers: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Decode. Returns the new token ids of each row, up to what ends its answer and without it.

        A row also ends where the reader's table of positions does, if it has one.

        Args:
            options: greedy with their defaults.
            numbers: of the examples, so that what is sampled for one does not depend on how a data
                set is cut into batches; 0, 1, ... if not given.

        Raises:
            ConfigError: see `cache`; not one number for each row; or logits that are no numbers.
        """
        with self._reader.lock:  # or another thread's prefill takes the cache away
            return self._decode(options or DecodeOptions(), numbers)

    def _decode(self, options: DecodeOptions, numbers: Sequence[int] | None) -> list[list[int]]:
        reader = self._reader
        cache = self._roomy_cache(options.max_new_tokens - 1)  # the last token is not fed back
        if bool(self.logits_BV.isnan().any()):  # the likeliest token of these would be number 0
            raise ConfigError(
                f"reader {reader.name!r} computes NaN from this prompt: in {reader.model.dtype} "
                "something overflows; take a smaller prefix gain, or another dtype"
            )
        rows = len(self._lengths_B)
        numbers = row_numbers(numbers, rows=rows)
        feed = self._feeder(cache)
        stops, logits_BV = reader.stop_ids, self.logits_BV
        stop_ids = torch.tensor(stops, device=logits_BV.device)
        done_B = torch.zeros(rows, dtype=torch.bool, device=logits_BV.device)
        new_ids: list[Tensor] = []
        for step in range(options.max_new_tokens):
            token_B = pick_tokens(
                reader.of_tokens(logits_BV).float(),
                step,
                options,
                numbers=numbers,
                stop_ids=stops,
            )
            done_B |= torch.isin(token_B, stop_ids)
            new_ids.append(torch.where(done_B, stop_ids[0], token_B))
            if step + 1 == options.max_new_tokens:
                break
            if reader.learns_positions:
                done_B |= self._beyond_table(step, done_B)
            if bool(done_B.all()):
                break
            logits_BV = feed(token_B, step)
        return _until(torch.stack(new_ids, 1).tolist(), stop=stops[0])

    def _feeder(self, cache: Cache) -> Callable[[Tensor, int], Tensor]:
        """What reads a token of each row and gives the next one's logits: a graph where there is
        one of this cache."""
        if self._step is not None and isinstance(cache, StaticCache):
            read = self._step()
            if read is not None:
                return lambda token_B, _number: read(token_B)
        return _Decoder(
            self._reader,
            cache,
            lengths_B=self._lengths_B,
            columns=self.positions,
            padded_right=self._padded_right,
            layers=self._layers,
        )

    def _roomy_cache(self, new_tokens: int) -> Cache:
        """`cache`, or one that grows where a static one has no room for so many tokens."""
        cache = self.cache
        if isinstance(cache, StaticCache) and self.positions + new_tokens > _capacity(cache):
            return without_limit(cache, self.positions)
        return cache

    def _beyond_table(self, step: int, done_B: Tensor) -> Tensor:
        """Which rows `[B]` cannot take the token of this step in; the first time, it is said."""
        reader = self._reader
        beyond = torch.from_numpy(self._lengths_B + step >= reader.max_positions)
        beyond_B = beyond.to(done_B.device)
        if bool((beyond_B & ~done_B).any()):
            reader.warn_once(
                "answers",
                f"an answer was cut: reader {reader.name!r} has a table of "
                f"{reader.max_positions:,} positions, and prompt and answer fill it; shorten the "
                "prompt, or choose another reader",
            )
        return beyond_B


class _Decoder:
    """Reads one token more of each row, with everything before it in the cache.

    Args:
        lengths_B: real positions of each row before the first new token.
        columns: of the cache, padding included.
        padded_right: whether padding stands at the end of those columns, or at their start.
        layers: what changes the hidden states between the reader's layers.
    """

    def __init__(
        self,
        reader: Reader,
        cache: Cache,
        *,
        lengths_B: np.ndarray,
        columns: int,
        padded_right: bool,
        layers: LayerUpdates | None,
    ) -> None:
        self._reader, self._cache, self._columns = reader, cache, columns
        self._layers = layers
        self._table = reader.max_positions if reader.learns_positions else None
        self._lengths_B = torch.from_numpy(lengths_B).to(reader.device)
        self._static = isinstance(cache, StaticCache)
        column_1N = torch.arange(columns, device=reader.device)[None]
        length_B1 = self._lengths_B[:, None]
        mask_BN = (
            column_1N < length_B1 if padded_right else column_1N >= columns - length_B1
        ).long()
        if isinstance(cache, StaticCache):  # all of its columns need an entry
            mask_BN = torch.nn.functional.pad(mask_BN, (0, _capacity(cache) - columns))
        self._mask_BN = mask_BN

    def __call__(self, token_B: Tensor, step: int) -> Tensor:
        """Logits `[B, V]` of the token after this one, which is number `step` of its answer."""
        reader, end = self._reader, self._columns + step
        if self._static:
            self._mask_BN[:, end] = 1
        else:
            self._mask_BN = torch.nn.functional.pad(self._mask_BN, (0, 1), value=1)
        beyond = 0 if self._table is None else self._mask_BN.shape[1] - self._table
        if beyond > 0 and not self._static:
            # Rows that have something here have ended: their table is full. Some models count the
            # columns, not the positions (GPT-Neo, MPT), and have no more of these either.
            self._cache = without_first(cast(DynamicCache, self._cache), beyond)
            self._mask_BN = self._mask_BN[:, beyond:]
        position_B = self._lengths_B + step
        if reader.learns_positions:  # rows that are done go on reading, to no effect
            position_B = position_B.clamp(max=reader.max_positions - 1)
        with updated_layers(reader.model, self._layers):
            hidden_B1D = reader.backbone(
                input_ids=token_B[:, None].to(reader.device),
                attention_mask=self._mask_BN,
                position_ids=position_B[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        return reader.logits(hidden_B1D[:, -1])


def row_numbers(numbers: Sequence[int] | None, *, rows: int) -> Sequence[int]:
    """The numbers of a batch's examples, 0, 1, ... if none are given.

    Raises:
        ConfigError: not one for each row.
    """
    numbers = range(rows) if numbers is None else numbers
    if len(numbers) != rows:
        raise ConfigError(f"{len(numbers)} numbers for {rows} prompts; give one for each")
    return numbers


def _until(rows: Sequence[list[int]], *, stop: int) -> list[list[int]]:
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def _capacity(cache: StaticCache) -> int:
    return cast(int, cast(Any, cache.layers[0]).max_cache_len)
