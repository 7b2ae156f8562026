"""The log of a run: `diagnostics.jsonl`, its numbers on boards, statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.files.records import read_records
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.training.boards import open_boards


class Tracker:
    """Appends one JSON object per logged step and mirrors its numbers to boards.

    Args:
        folder: of the run; made if missing.
        resume_step: records of later steps are dropped, as the run is about to write them again;
            None starts anew.
        trackers: names of the boards (`RunConfig.trackers`).
        config: the run's configuration, for those that show it.

    Raises:
        ConfigError: a tracker does not start.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        resume_step: int | None,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder.diagnostics
        folder.path.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None:
            kept = [r for r in read_records(self.path) if r["step"] <= resume_step]
        write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._boards = open_boards(trackers, folder, resume_step=resume_step, config=config)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one record with its `step`; tensors are 0-d; non-finite numbers become null."""
        plain = _plain(record)
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        self._show({key: v for key, v in _scalars(plain) if key != "step"}, plain["step"])

    def mirror(self, prefix: str, values: Mapping[str, Any], *, step: int) -> None:
        """Numbers for the boards alone, under names that begin with the prefix."""
        self._show(dict(_scalars(_plain(values), f"{prefix}/")), step)

    def _show(self, values: Mapping[str, float], step: int) -> None:
        for board in self._boards:
            board.add(values, step)

    def close(self) -> None:
        """Flush and close all logs."""
        self._file.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """The value with tensors as numbers and non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record under names such as `losses/answer`."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def module_gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """2-norm of each module's gradient (0 without one), read from the device in one go."""
    norms = []
    for module in modules.values():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients).float())
    values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    return dict(zip(modules, values, strict=True))
