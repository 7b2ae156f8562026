"""What a frozen reader's attention takes from a text: the targets of the objective `attention`.

For some queries, per layer and head, the output of attention over the text's positions alone, and
its log-mass (the logarithm of the sum of the exponentials of the scores). Whatever gives the same
outputs and masses can stand in the text's place, however few keys and values it has
(arXiv:2602.16284). The reader runs its own attention; this only looks on.

Shapes: B texts, L layers, H key/value heads, G query heads of each, N queries, Q = G N, T
positions, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.attention import own_attention
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.trace import check_observed

LOOKED_ON = "latentwire_looked_on"


@dataclass(frozen=True)
class AttentionQuestion:
    """One text prompt, and which queries of it are asked.

    Attributes:
        prompt: the text with what follows it.
        start, stop: where the text's positions begin and end.
        places: the positions of the N queries, behind the text.
        slots: how many positions will stand in the text's place: the queries are turned to where
            they will then be.
    """

    prompt: Prompt
    start: int
    stop: int
    places: tuple[int, ...]
    slots: int


@torch.no_grad()
def attention_targets(reader: Reader, questions: Sequence[AttentionQuestion]) -> Tensor:
    """Targets `[B, L, H, Q, 2 D + 1]`, fp32 on the reader's device: the queries (turned, times the
    scale of attention), the outputs, and the log-masses, which are minus infinity for queries that
    see nothing of the text (sliding windows).

    Args:
        questions: all with one number of queries.

    Raises:
        ConfigError: a reader whose attention cannot be observed, or whose queries not turned.
        DataError: more positions than the reader's table has.
    """
    batch = reader.collate([question.prompt for question in questions])
    watcher = _Watcher(reader, questions)
    with _watched(reader, watcher):
        reader.backbone(**batch.model_inputs(), use_cache=False)
    check_observed(reader, len(watcher.layers), layers=reader.kv_geometry.layers)
    return torch.stack([layer.to(reader.device) for layer in watcher.layers], 1)


class _Watcher:
    """Notes the targets of each layer as it is run."""

    def __init__(self, reader: Reader, questions: Sequence[AttentionQuestion]) -> None:
        self._turner = reader.turner  # made now: it runs the reader, unwatched
        self.layers: list[Tensor] = []  # [B, H, Q, 2 D + 1] each
        device = reader.device
        self._places_BN = torch.tensor([q.places for q in questions], device=device)
        self._start_B, self._stop_B, slots_B = torch.tensor(
            [[q.start, q.stop, q.slots] for q in questions], device=device
        ).unbind(1)
        self._turn_BN = (slots_B - (self._stop_B - self._start_B))[:, None].expand_as(
            self._places_BN
        )
        self._last = max(len(q.prompt.ids) for q in questions) - 1

    def see(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        """Note a layer's targets: query `[B, G H, T, D]`, key and value `[B, H, T, D]`."""
        device, heads = query.device, key.shape[1]
        places_BN = self._places_BN.to(device)
        index = places_BN[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        query_BHND = query.gather(2, index).float()
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query_BHQD = (query_BHND * scale).unflatten(1, (heads, -1)).flatten(2, 3)
        scores_BHQT = query_BHQD @ key.float().mT
        if (cap := options.get("softcap")) is not None:
            scores_BHQT = cap * (scores_BHQT / cap).tanh()
        hidden_BNT = ~self._visible(places_BN, key.shape[2], options.get("sliding_window"))
        groups = query.shape[1] // heads
        hidden_BQT = hidden_BNT.repeat(1, groups, 1)  # groups of one key/value head in turn
        scores_BHQT = scores_BHQT.masked_fill(hidden_BQT[:, None], -torch.inf)
        out_BHQD = scores_BHQT.softmax(-1).nan_to_num() @ value.float()
        mass_BHQ1 = scores_BHQT.logsumexp(-1, keepdim=True)
        turned_BHND = self._turner.turn(
            query_BHND * scale,
            layer=len(self.layers),
            by_BT=self._turn_BN.to(device),
            last=self._last,
        )
        turned_BHQD = turned_BHND.unflatten(1, (heads, -1)).flatten(2, 3)
        self.layers.append(torch.cat([turned_BHQD, out_BHQD, mass_BHQ1], -1))

    def _visible(self, places_BN: Tensor, positions: int, window: int | None) -> Tensor:
        """Which positions `[B, N, T]` of its text each query sees."""
        position_T = torch.arange(positions, device=places_BN.device)
        start_B1, stop_B1 = (
            end.to(places_BN.device)[:, None] for end in (self._start_B, self._stop_B)
        )
        inside_BT = (position_T >= start_B1) & (position_T < stop_B1)
        if window is None:
            return inside_BT[:, None].expand(-1, places_BN.shape[1], -1)
        return inside_BT[:, None] & (position_T > places_BN[..., None] - window)


@contextmanager
def _watched(reader: Reader, watcher: _Watcher) -> Iterator[None]:
    """Inside the block the reader's layers run their own attention, and the watcher looks on."""
    own = reader.model.config.get_text_config(decoder=True)._attn_implementation

    def look_on(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        watcher.see(query, key, value, options)
        return _attention_of(own, module)(module, query, key, value, mask, **options)

    AttentionInterface.register(LOOKED_ON, look_on)
    AttentionMaskInterface.register(LOOKED_ON, ALL_MASK_ATTENTION_FUNCTIONS[own])
    with own_attention(reader.model, LOOKED_ON), torch.autocast(reader.device.type, enabled=False):
        yield


def _attention_of(name: str, module: nn.Module) -> Callable[..., Any]:
    """A registered attention function, or the eager one in a model's own file."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
