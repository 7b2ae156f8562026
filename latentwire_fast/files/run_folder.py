"""The paths of a run's files. No other module joins these names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.atomic import check_replaceable


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    Attributes:
        path: the folder itself, as it was given.
    """

    path: Path

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.path.resolve().name

    @property
    def lock(self) -> Path:
        """Locked by the one process that writes."""
        return self.path / ".lock"

    @property
    def config(self) -> Path:
        """The run's configuration."""
        return self.path / "config.json"

    @property
    def diagnostics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "diagnostics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The numbers of `diagnostics`, for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def nonfinite(self) -> Path:
        """The step that a NaN or an infinity stopped, if one did."""
        return self.path / "nonfinite.json"

    @property
    def checkpoints(self) -> Path:
        """The newest checkpoints."""
        return self.path / "checkpoints"

    @property
    def frozen_work(self) -> Path:
        """What frozen models computed of the data, kept for the next epoch."""
        return self.path / "frozen_work"

    @property
    def model(self) -> Path:
        """The trained model; it appears as a whole when the training is over."""
        return self.path / "model"

    @property
    def unfinished_model(self) -> Path:
        """The trained model while it is written."""
        return self.path / "model.tmp"

    @property
    def best_model(self) -> Path:
        """The model of the step that validated best, where a run validates."""
        return self.path / "model_best"

    @property
    def unfinished_best_model(self) -> Path:
        """That model while it is written."""
        return self.path / "model_best.tmp"

    @property
    def validation(self) -> Path:
        """The scores of every validation."""
        return self.path / "validation.json"

    @property
    def model_card(self) -> Path:
        """The model card that the evaluation writes beside the model."""
        return self.model / "README.md"

    @property
    def eval(self) -> Path:
        """The run's own report; its figures are in it too."""
        return self.path / "eval"

    @property
    def metrics(self) -> Path:
        """Every score, as JSON; the last file that an evaluation writes."""
        return self.eval / "metrics.json"

    @property
    def metrics_table(self) -> Path:
        """The scores as a table."""
        return self.eval / "metrics.csv"

    @property
    def predictions(self) -> Path:
        """One JSON object per held-out example."""
        return self.eval / "predictions.jsonl"

    def pattern(self, name: str) -> Path:
        """The results of one pattern (`latentwire_fast.evaluate pattern`), as JSON."""
        return self.eval / f"pattern_{name}.json"

    @property
    def report(self) -> Path:
        """The report as a page that holds all of itself."""
        return self.eval / "report.html"

    @property
    def report_text(self) -> Path:
        """The report as Markdown."""
        return self.eval / "report.md"

    @property
    def is_trained(self) -> bool:
        """Whether training is complete and its model saved."""
        return (self.model / "config.json").exists()

    def owns(self, path: Path) -> bool:
        """Whether training or evaluation writes a file of this path, or into a folder of it."""
        path, run = path.resolve(), self.path.resolve()
        if not path.is_relative_to(run):
            return False
        here = type(self)(run)
        folders = (
            *(here.model, here.best_model, here.checkpoints, here.frozen_work, here.tensorboard),
        )
        files = (here.config, here.diagnostics, here.validation, here.nonfinite, here.lock)
        report = (here.metrics, here.metrics_table, here.predictions, here.report, here.report_text)
        if path.parent == here.eval and path.name.startswith("pattern_"):
            return True
        return path in (*files, *report) or any(path.is_relative_to(f) for f in (*folders, *files))

    def check_output(self, out: Path) -> None:
        """Raise unless `--out` leaves the run's own files alone.

        Raises:
            ConfigError: it does not.
        """
        if self.owns(out):
            raise ConfigError(f"--out {out} belongs to the run; give another")

    def check_output_file(self, out: Path, *, context: Path | None = None) -> None:
        """Raise unless a file can be written to `--out`.

        Args:
            context: a file that it must not replace.

        Raises:
            ConfigError, OSError: it cannot.
        """
        check_replaceable(out)
        self.check_output(out)
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it")
        both = context is not None and context.exists() and out.exists()
        if both and context is not None and out.samefile(context):
            raise ConfigError(f"--out {out} is the context's own file; give another")


class TextLoraFolder(RunFolder):
    """The paths of a run that trains a reader's low-rank updates on text. What it makes is no model
    of latents, but a reader."""

    @property
    def model(self) -> Path:
        """The reader: updates and tokenizer, a source that `--reader NAME=` takes."""
        return self.path / "reader"

    @property
    def unfinished_model(self) -> Path:
        """The reader while it is written."""
        return self.path / "reader.tmp"

    @property
    def best_model(self) -> Path:
        """The reader of the step that validated best."""
        return self.path / "reader_best"

    @property
    def unfinished_best_model(self) -> Path:
        """That reader while it is written."""
        return self.path / "reader_best.tmp"

    @property
    def scores(self) -> Path:
        """The reader's scores on text, without the updates and with them."""
        return self.path / "scores.json"

    @property
    def is_trained(self) -> bool:
        """Whether training is complete and the reader saved."""
        return (self.model / "adapter_config.json").exists()
