"""One tree of errors. A message says what was wrong, where, and what to do."""

from __future__ import annotations


class LatentWireError(Exception):
    """Base of every error that this package raises on purpose."""


class PayloadError(LatentWireError, ValueError):
    """Bytes that are not a valid payload, or a latent that cannot become one."""


class ConfigError(LatentWireError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(LatentWireError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged, or made for something else."""


class DataError(LatentWireError, ValueError):
    """A data file that does not hold what its format promises."""


class KernelError(LatentWireError, RuntimeError):
    """A kernel backend that cannot run here, or an op called on what it does not take."""


class TrainingError(LatentWireError, RuntimeError):
    """A run that cannot go on: a non-finite loss, memory that does not suffice, a second writer."""


class RunStopped(TrainingError):
    """A run that a signal asked to stop, and that has saved all of itself.

    Attributes:
        status: the exit status that a shell expects then: 128 and the number of the signal.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
