"""The probe: what a reader may be used for, found out on a few tokens when it is loaded.

Models differ in more ways than a list of families could hold: some ignore position ids, some keep
a state in the place of keys and values, some count padding. So each way in which this package has
a reader read is tried, and compared with what the model computes when it reads the same tokens
alone, without padding or a cache. A dozen passes of six tokens; where a window is short, a dozen
more that reach beyond it.

Shapes: B rows, T positions, D hidden width; L layers, H key/value heads, P deep positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latentwire_fast.errors import LatentWireError
from latentwire_fast.prompts.batch import PaddingSide, PromptBatch, collate
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.abilities import ReaderAbilities
from latentwire_fast.readers.arriving_layer import training_cache
from latentwire_fast.readers.checks import backbone_of
from latentwire_fast.readers.decoding_cache import decoding_cache, keeps_states, move_right
from latentwire_fast.readers.embeddings import input_embedding
from latentwire_fast.readers.kv_cache import CacheFiller, decoder_layers
from latentwire_fast.readers.kv_geometry import KVGeometry

# Of the trials: tokens of their two rows, and by what hidden states may differ, relative to their
# size. Rounding in half precision comes to some hundredths; a wrong mask to 0.3 and more.
LENGTHS = (6, 3)
TOLERANCE = {torch.float32: 0.01}
TOLERANCE_OF_HALVES = 0.2

SHORT_WINDOW = 40  # prompts that reach beyond a longer one would take too long
# What configurations call a window: how many positions some layers see.
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Subject:
    """What is probed: a model, and what there is to know of its tokens.

    Attributes:
        tokens: ids of ordinary ones.
        pad_id: stands at padding.
        positions: how many the model was made for.
    """

    model: PreTrainedModel
    tokens: Sequence[int]
    pad_id: int
    positions: int

    @property
    def backbone(self) -> nn.Module:
        """The model without its output embedding."""
        return backbone_of(self.model)

    @property
    def embedding(self) -> nn.Embedding:
        """Its input embedding."""
        return input_embedding(self.model)

    @property
    def device(self) -> torch.device:
        """Of the input embedding."""
        return self.embedding.weight.device


def tolerance(dtype: torch.dtype) -> float:
    """By what hidden states of a reader of this dtype may differ, relative to their size."""
    return TOLERANCE.get(dtype, TOLERANCE_OF_HALVES)


def probe(subject: Subject) -> ReaderAbilities:
    """Try what a reader may be used for."""
    found = _Trials(subject, LENGTHS).abilities()
    longer = _beyond_the_window(subject)
    if longer and not found.reads:
        beyond = _Trials(subject, longer).abilities()
        found = replace(beyond, **{name: reason for name, reason in vars(found).items() if reason})
    return found


def _beyond_the_window(subject: Subject) -> tuple[int, int] | None:
    """Lengths of two rows that reach beyond the reader's shortest window, if that is short."""
    config = subject.model.config.get_text_config(decoder=True)
    values = (getattr(config, name, None) for name in _WINDOWS)
    windows = [value for value in values if isinstance(value, int) and value > 0]
    if not windows or not min(windows) <= SHORT_WINDOW:
        return None
    longest = min(windows) + LENGTHS[0]
    return (longest, longest - LENGTHS[1]) if longest <= subject.positions else None


class _Trials:
    """Each use of a reader against two rows of tokens that it read alone."""

    def __init__(self, subject: Subject, lengths: tuple[int, int]) -> None:
        self.subject = subject
        start = len(subject.tokens) // 3
        self.rows = [
            [
                subject.tokens[(start + 7 * (place + 3 * number)) % len(subject.tokens)]
                for place in range(length)
            ]
            for number, length in enumerate(lengths)
        ]

    @torch.no_grad()
    def abilities(self) -> ReaderAbilities:
        """What the trials show."""
        self.alone = [
            self.subject.backbone(input_ids=self._ids(row), use_cache=False).last_hidden_state[0]
            for row in self.rows
        ]
        in_a_batch = self._reason(lambda: self._padded("right"), "in a batch padded on the right")
        decoded = self._reason(self._decoded, "when it decodes")
        if in_a_batch or decoded:
            return ReaderAbilities(reads=in_a_batch or decoded)
        return ReaderAbilities(
            soft=self._reason(self._replayed, "from embeddings in the place of tokens"),
            deep=self._reason(self._prefixed, "behind a prefix of its own keys and values"),
            together=self._reason(
                self._decoded_together, "when it decodes a batch of several lengths"
            ),
            left=self._reason(lambda: self._padded("left"), "in a batch padded on the left"),
        )

    def _reason(self, trial: Callable[[], float], how: str) -> str:
        """Why a trial does not hold; nothing where it does."""
        try:
            difference = trial()
        except torch.OutOfMemoryError:
            raise
        except LatentWireError as error:
            return str(error)
        except Exception as error:  # models raise of all kinds on what they do not know
            message = shorten(" ".join(str(error).split()), 120, placeholder=" ...")
            return f"{how} it fails ({type(error).__name__}: {message})"
        if difference <= tolerance(self.subject.model.dtype):
            return ""  # NaN is not either
        return f"{how} it computes something else than for the text alone (off by {difference:.2g})"

    # --- trials: the largest relative difference of each ------------------------------------------

    def _padded(self, side: PaddingSide) -> float:
        """As training and scoring read a batch."""
        batch = self._collate([Prompt(row, None, [False] * len(row)) for row in self.rows], side)
        hidden_BTD = self._hidden(batch)
        mask_BT = batch.mask_BT.to(hidden_BTD.device)
        rows = zip(hidden_BTD, mask_BT, strict=True)
        return self._most([hidden_TD[mask_T] for hidden_TD, mask_T in rows])

    def _replayed(self) -> float:
        """With the second token and its neighbours as embeddings."""
        prompts = [Prompt([row[0], *row[-1:]], 1, [False, False]) for row in self.rows]
        embeddings = [self.subject.embedding(self._ids(row[1:-1])[0]) for row in self.rows]
        batch = self._collate(prompts, "right", prefixes=embeddings)
        hidden_BTD = self._hidden(batch)
        return self._most(
            [hidden_TD[: len(row)] for hidden_TD, row in zip(hidden_BTD, self.rows, strict=True)]
        )

    def _prefixed(self) -> float:
        """With the row's first half as a deep prefix, in a cache as training fills it."""
        subject, row = self.subject, self.rows[0]
        half = len(row) // 2
        cache = decoding_cache(subject.model)
        subject.backbone(input_ids=self._ids(row[:half]), past_key_values=cache, use_cache=True)
        geometry = KVGeometry.of_cache(cache, layers=len(decoder_layers(subject.model)))
        filled = training_cache(geometry.layers)
        filler = CacheFiller.for_model(subject.model, geometry=geometry)
        filler.fill(filled, prefix_L2BHPD=kept(cache), batch_size=1)
        hidden_1TD = self._read(row[half:], filled, after=half, keep=False)
        return self._most([hidden_1TD[0]], [self.alone[0][half:]])

    def _decoded(self) -> float:
        """A prompt read at once, then two tokens one by one, as a receiver decodes one prompt."""
        row = self.rows[0]
        cache = decoding_cache(self.subject.model)
        parts = [self._read(row[:-2], cache, after=0)]
        again = deepcopy(cache) if keeps_states(cache) else None
        for number in (-2, -1):
            place = len(row) + number
            parts.append(self._read([row[place]], cache, after=place, width=place + 1))
        found = self._most([torch.cat(parts, 1)[0]], self.alone[:1])
        if again is not None:  # a second answer starts from a copy of what the prompt left
            place = len(row) - 2
            hidden_1TD = self._read([row[place]], again, after=place, width=place + 1)
            found = max(found, self._most([hidden_1TD[0]], [self.alone[0][place : place + 1]]))
        return found

    def _decoded_together(self) -> float:
        """Two rows read in one batch, then a token more of each, as a receiver decodes a batch."""
        subject = self.subject
        prompts = [Prompt(row[:-1], 0, [False] * (len(row) - 1)) for row in self.rows]
        none = subject.embedding.weight.new_zeros(0, subject.embedding.weight.shape[1])
        batch = self._collate(prompts, "right", prefixes=[none] * len(prompts))
        cache = decoding_cache(subject.model)
        subject.backbone(**batch.model_inputs(), past_key_values=cache, use_cache=True)
        width = batch.ids_BT.shape[1]
        lengths_B = batch.lengths_B
        move_right(cache, (width - lengths_B).tolist())
        columns_N = torch.arange(width + 1, device=subject.device)
        hidden_B1D = subject.backbone(
            input_ids=torch.tensor([row[-1:] for row in self.rows], device=subject.device),
            attention_mask=(columns_N >= (width - lengths_B)[:, None]).long(),
            position_ids=lengths_B[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._most([*hidden_B1D], [hidden_TD[-1:] for hidden_TD in self.alone])

    # --- helpers ----------------------------------------------------------------------------------

    def _ids(self, row: Sequence[int]) -> Tensor:
        return torch.tensor([[*row]], device=self.subject.device)

    def _collate(self, prompts: list[Prompt], side: PaddingSide, **options: Any) -> PromptBatch:
        subject = self.subject
        options |= {"embedding": subject.embedding, "pad_id": subject.pad_id, "side": side}
        return collate(prompts, **options)

    def _hidden(self, batch: PromptBatch) -> Tensor:
        """Hidden states `[B, T, D]` of a batch, without a cache."""
        output = self.subject.backbone(**batch.model_inputs(), use_cache=False)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _read(
        self, row: Sequence[int], cache: Any, *, after: int, width: int = 0, keep: bool = True
    ) -> Tensor:
        """Hidden states `[1, T, D]` of tokens behind `after` others.

        Args:
            width: of a mask that hides nothing, as decoding gives one; 0 for none.
        """
        ids_1T = self._ids(row)
        positions_1T = torch.arange(after, after + len(row), device=ids_1T.device)[None]
        inputs: dict[str, Any] = {"position_ids": positions_1T}
        if width:
            inputs |= {
                "input_ids": ids_1T,
                "attention_mask": torch.ones_like(self._ids(range(width))),
            }
        else:
            inputs["inputs_embeds"] = self.subject.embedding(ids_1T)
        output = self.subject.backbone(**inputs, past_key_values=cache, use_cache=keep)
        hidden_1TD: Tensor = output.last_hidden_state
        return hidden_1TD

    def _most(self, found: list[Tensor], expected: list[Tensor] | None = None) -> float:
        """The largest difference of a row's hidden states `[T, D]`.

        In half precision the median over a row's positions: a router that rounding moves to another
        expert changes one position, a wrong mask or position nearly all.
        """
        rows = zip(found, self.alone if expected is None else expected, strict=True)
        differences = []
        for found_TD, expected_TD in rows:
            expected_TD = expected_TD.float()
            away_T = (found_TD.float() - expected_TD).norm(dim=-1) / expected_TD.norm(dim=-1)
            exact = self.subject.model.dtype in TOLERANCE
            differences.append(float(away_T.max() if exact else away_T.median()))
        return max(differences)


def kept(cache: Any) -> Tensor:
    """Keys and values `[L, 2, B, H, P, D]` of all layers, on the device of the first."""
    layers = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
    return torch.stack([layer.to(layers[0].device) for layer in layers])
