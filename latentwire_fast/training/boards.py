"""Where the numbers of a run's log are shown: TensorBoard, or a tracker of accelerate by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.run_folder import RunFolder

PROJECT = "latentwire-fast"  # under which trackers show all runs


class Board(Protocol):
    """Takes the numbers of a step."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers by their names."""

    def close(self) -> None:
        """Show what is still on the way, and end."""


class TensorBoard:
    """Files in the run's folder.

    Args:
        resume_step: what is there of later steps is hidden; None hides all.
    """

    def __init__(self, folder: RunFolder, *, resume_step: int | None) -> None:
        self._writer = SummaryWriter(
            str(folder.tensorboard), purge_step=0 if resume_step is None else resume_step + 1
        )

    def add(self, values: Mapping[str, float], step: int) -> None:
        """As `Board.add`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As `Board.close`."""
        self._writer.close()


class AccelerateBoard:
    """A tracker of accelerate's, such as `wandb` or `trackio`. The run's folder names the run.

    Args:
        name: of the tracker.
        resume_step: None begins the run anew; otherwise it goes on.
        config: the run's configuration, which the tracker shows beside the numbers.

    Raises:
        ConfigError: it does not start.
    """

    def __init__(
        self, name: str, folder: RunFolder, *, resume_step: int | None, config: Mapping[str, Any]
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        goes_on = "allow" if resume_step is not None else "never"
        options: dict[str, Any] = {"name": folder.name, "config": dict(config), "resume": goes_on}
        if name == "wandb":  # finds a run by its id; without `resume` it overwrites that
            options |= {"id": folder.name, "resume": "allow" if resume_step is not None else None}
        try:
            self._tracker: Any = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options)
            self._tracker.start()
        except Exception as error:  # of whatever kind the package raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"trackers: {name!r} does not start ({reason}); log in as it asks for, or leave it "
                "out of `trackers`"
            ) from error

    def add(self, values: Mapping[str, float], step: int) -> None:
        """As `Board.add`."""
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """As `Board.close`."""
        self._tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise now, rather than after what comes before the first step, where a package is missing.

    Raises:
        ConfigError: it is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"trackers: the package {name!r} is not installed; pip install {name}, or leave it "
                "out of `trackers`"
            )


def open_boards(
    names: Sequence[str],
    folder: RunFolder,
    *,
    resume_step: int | None,
    config: Mapping[str, Any] | None = None,
) -> list[Board]:
    """The boards of these names.

    Raises:
        ConfigError: as `AccelerateBoard`.
    """
    return [
        TensorBoard(folder, resume_step=resume_step)
        if name == "tensorboard"
        else AccelerateBoard(name, folder, resume_step=resume_step, config=config or {})
        for name in names
    ]
