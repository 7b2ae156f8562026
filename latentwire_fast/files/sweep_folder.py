"""The paths of a sweep's files. No other module joins these names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentwire_fast.files.run_folder import RunFolder


@dataclass(frozen=True)
class SweepFolder:
    """The paths of a sweep: `VARIANT/seedS/` is a run folder, and its tables are beside those.

    Attributes:
        path: the folder itself, as it was given.
    """

    path: Path

    def run(self, name: str) -> RunFolder:
        """The run of that name, such as `base/seed0`."""
        return RunFolder(self.path / name)

    def log(self, name: str) -> Path:
        """What the process of a run printed."""
        return self.path / name / "train.log"

    @property
    def frozen_work(self) -> Path:
        """What the first run that finished computed with frozen models, lent to the others."""
        return self.path / "frozen_work"

    @property
    def history(self) -> Path:
        """One JSON object per process that ended: how, after how long, and with which scores."""
        return self.path / "metrics_history.jsonl"

    @property
    def table(self) -> Path:
        """The scores of all variants, as JSON."""
        return self.path / "table.json"

    @property
    def table_text(self) -> Path:
        """The scores of all variants, as Markdown."""
        return self.path / "table.md"

    @property
    def figure(self) -> Path:
        """F1 against bytes."""
        return self.path / "f1_bytes.png"
