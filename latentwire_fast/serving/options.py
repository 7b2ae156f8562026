"""Options of a receiver: its engine, its memory, the strength of its prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from latentwire_fast.config.parts import check_gain
from latentwire_fast.errors import ConfigError

Engine = Literal["auto", "eager", "compile", "graph"]
Mark = Callable[[str], None]


def unmarked(_phase: str) -> None:
    """The `mark` of a receiver that nobody times."""


@dataclass(frozen=True)
class ReceiverOptions:
    """Settings of a `Receiver`.

    Attributes:
        engine: `auto` is `graph` where the reader can be captured as a CUDA graph, else `eager`;
            `compile` is `torch.compile` of the backbone, which raises where it would be compiled
            more often than torch allows.
        new_tokens: how many tokens the fixed memory of a graph has room for behind the prompt.
            Longer answers are decoded too, in memory that grows.
        graph_bytes: of the device's memory for the graphs of all shapes of batch that are kept
            captured, beside what they share; None for a quarter of what is free when the receiver
            is made.
        keep_head: keep the reader's keys and values of what prompts with a payload have before it
            (the template), and read that once, not with each request. Only where no deep prefix is
            trained; not for readers that take none.
        merge_lora: add a reader's low-rank updates (LoRA) to its weights, for good: it is then read
            as fast as without them, and by any engine.
        prefix_gain: factor on the calibrated size of soft tokens, and on the values (not the keys)
            of a deep prefix; 1 is what was trained, 1000 the most.
        mark: called with the name of each phase when it has been queued: `parse`, `dequantise`
            (where it is not part of the adapter, see `TrainedParts`), `adapter`, `placement`,
            `reader`.

    Raises:
        ConfigError: an option outside its range.
    """

    engine: Engine = "auto"
    new_tokens: int = 32
    graph_bytes: int | None = None
    prefix_gain: float = 1.0
    keep_head: bool = False
    merge_lora: bool = False
    mark: Mark = unmarked

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ConfigError(f"engine={self.engine!r}, expected one of {get_args(Engine)}")
        for name in ("new_tokens", "graph_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}, expected at least 1")
        check_gain("prefix_gain", self.prefix_gain)
