"""What a prefill leaves: the first token's logits, and a cache to decode from.

Shapes: B rows, T columns of the padded prompts, P deep positions before them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.graphs import CapturedPass, set_length


class Prefilled:
    """A batch of prompts that were read.

    Attributes:
        logits_BV: of the first new token.
        positions: P + T, how many positions the cache holds. Those of a row end earlier where its
            prompt is shorter than the longest; `generate` masks the rest out.

    Args:
        capacity: positions that may be held, new tokens included.
        captured: the graph that made it, if one did, and that owns the cache.
    """

    def __init__(
        self,
        reader: Reader,
        logits_BV: Tensor,
        *,
        cache: Cache,
        lengths_B: np.ndarray,
        width: int,
        deep_positions: int,
        capacity: int,
        captured: CapturedPass | None,
    ) -> None:
        self.logits_BV = logits_BV
        self.positions = deep_positions + width
        self._reader = reader
        self._cache = cache
        self._lengths_B = lengths_B
        self._deep_positions = deep_positions
        self._capacity = capacity
        self._captured = captured
        self._serial = captured.serial if captured else 0

    @property
    def cache(self) -> Cache:
        """The keys and values of the prompts, and of nothing after them.

        Raises:
            ConfigError: a later prefill of the same shape took the memory.
        """
        if self._captured is not None and self._captured.serial != self._serial:
            raise ConfigError(
                "a later prefill of the same shape has overwritten this one's keys and values; "
                "decode each prefill before the next, or use one receiver for each"
            )
        if isinstance(self._cache, StaticCache):
            set_length(self._cache, self.positions)
        else:
            extra = int(self._cache.get_seq_length()) - self.positions
            if extra:
                cast(DynamicCache, self._cache).crop(-extra)
        return self._cache

    @torch.no_grad()
    def generate(self, max_new_tokens: int) -> list[list[int]]:
        """Decode greedily. Returns the new token ids of each row, up to its EOS and without it.

        Raises:
            ConfigError: so many tokens do not fit the cache, or see `cache`.
        """
        reader, cache = self._reader, self.cache
        last = self.positions + max_new_tokens - 1  # the last token is not fed back
        if max_new_tokens < 1 or last > self._capacity:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens} after {self.positions} positions do not fit the "
                f"{self._capacity} of this prefill; make the receiver with a larger `new_tokens`"
            )
        is_static = isinstance(cache, StaticCache)
        columns = self._capacity if is_static else last
        starts_B = torch.from_numpy(self._lengths_B).to(reader.device) + self._deep_positions
        mask_BN = (torch.arange(columns, device=reader.device) < starts_B[:, None]).long()
        logits_BV = self.logits_BV
        new_ids: list[Tensor] = []
        done_B = torch.zeros(len(starts_B), dtype=torch.bool, device=logits_BV.device)
        for step in range(max_new_tokens):
            token_B = logits_BV.float().argmax(-1)
            done_B |= token_B == reader.prompts.eos_id
            new_ids.append(token_B)
            if step + 1 == max_new_tokens or bool(done_B.all()):
                break
            end = self.positions + step + 1
            mask_BN[:, end - 1] = 1
            hidden_B1D = reader.backbone(
                input_ids=token_B[:, None].to(reader.device),
                attention_mask=mask_BN if is_static else mask_BN[:, :end],
                position_ids=(starts_B + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits_BV = reader.head(hidden_B1D[:, -1])
        return _until(torch.stack(new_ids, 1).tolist(), eos=reader.prompts.eos_id)


def _until(rows: Sequence[list[int]], *, eos: int) -> list[list[int]]:
    return [row[: row.index(eos)] if eos in row else row for row in rows]
