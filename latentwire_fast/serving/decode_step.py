"""One decoding step that a graph can hold: all that changes from token to token is on the device.

Shapes: B rows of the cache, N its length, V vocabulary, D `d_model`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.static_cache import set_length


class DecodeStep:
    """Reads one token more of each row of a static cache, at one position behind the one before.

    Column, positions and mask move on in the step itself. The mask has a value for each column, in
    the form in which attention adds it to the scores: transformers would make that of a shorter
    one, and look at its values on the host.

    Args:
        cache: initialised; prompts are padded at the end of their rows.

    Attributes:
        token_B: the tokens to read.
    """

    def __init__(self, reader: Reader, cache: StaticCache) -> None:
        self._reader, self._cache = reader, cache
        first = cache.layers[0]
        rows, _, length, _ = first.keys.shape  # type: ignore[union-attr]
        device, dtype = reader.device, reader.embedding.weight.dtype
        self.token_B = torch.zeros(rows, dtype=torch.long, device=device)
        self._position_B = torch.zeros_like(self.token_B)
        self._column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self._mask_B11N = torch.zeros(rows, 1, 1, length, dtype=dtype, device=device)
        self._started: tuple[np.ndarray, int] | None = None

    @property
    def bytes(self) -> int:
        """Of its own tensors."""
        return self._mask_B11N.nbytes + 2 * self.token_B.nbytes

    def start(self, lengths_B: np.ndarray, *, columns: int) -> None:
        """Go on behind prompts.

        Args:
            lengths_B: positions of each row; rows beyond these are as the last.
            columns: of the cache that the prompts take, padding included.
        """
        self._started = lengths_B, columns
        rows, length = len(self.token_B), self._mask_B11N.shape[3]
        padded_B = np.pad(lengths_B, (0, rows - len(lengths_B)), mode="edge")
        self._position_B.copy_(torch.from_numpy(padded_B))
        self._column_1.fill_(columns)
        column_N = torch.arange(length, device=self._mask_B11N.device)
        hidden_BN = column_N >= self._position_B[:, None]
        self._mask_B11N.zero_()
        lowest = torch.finfo(self._mask_B11N.dtype).min
        self._mask_B11N.masked_fill_(hidden_BN[:, None, None], lowest)
        set_length(self._cache, columns)

    def hidden(self) -> Tensor:
        """Last hidden states `[B, D]` of the tokens, and one step forward."""
        reader, position_B = self._reader, self._position_B
        if reader.learns_positions:  # rows that are done go on reading, to no effect
            position_B = position_B.clamp(max=reader.max_positions - 1)
        self._mask_B11N.index_fill_(3, self._column_1, 0)
        hidden_B1D = reader.backbone(
            input_ids=self.token_B[:, None],
            attention_mask=self._mask_B11N,
            position_ids=position_B[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._position_B += 1
        self._column_1 += 1
        return hidden_B1D[:, -1]

    def logits(self) -> Tensor:
        """Logits `[B, V]` of the tokens after those, and one step forward."""
        return self._reader.logits(self.hidden())

    def restart(self) -> None:
        """Go back to the last start: warm-ups take no room in the cache."""
        assert self._started is not None
        lengths_B, columns = self._started
        self.start(lengths_B, columns=columns)
