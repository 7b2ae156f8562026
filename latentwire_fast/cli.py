"""Pieces that all entry points use: error reports, logging, reading of NAME=SOURCE, devices, and
modules with parts from outside the package."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import inspect
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypeVar

import tyro

from latentwire_fast.errors import ConfigError, LatentWireError, RunStopped

if TYPE_CHECKING:  # `--help` does without torch
    import torch

Arguments = TypeVar("Arguments")  # the dataclass of an entry point
Dtype = Literal["float32", "bfloat16", "float16"]
Language = Literal["en", "ar", "de", "es", "hi", "vi", "zh"]  # as config/parts.py has them
STANDARD = Path("-")  # in the place of a file: standard input, or standard output
# `import` is a word of Python's, so the field of the arguments has another name than the option.
Imports = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import")]
# `PATH=VALUE` and `NAME.FIELD=VALUE`: read by config/assignments.py.
Assignments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set")]
ReaderOptions = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]

_ADVICE = {
    errno.ENOSPC: "make room on that disk and run the same command again",
    errno.EDQUOT: "make room on that disk and run the same command again",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give the path of a file",
}


def run_entry_point(main: Callable[[], None]) -> None:
    """Run `main`; what a user can mend becomes one line on stderr and exit status 2.

    A run that was stopped says so in one line too; its status is 130 (Ctrl-C) or 143 (SIGTERM).
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "accelerate", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # what is left of the output goes nowhere, quietly
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: the reader of standard output ended before all was written", file=sys.stderr)
        sys.exit(2)
    except (LatentWireError, OSError) as error:
        line = " ".join(part.strip() for part in str(error).splitlines())
        advice = _ADVICE.get(error.errno or 0) if isinstance(error, OSError) else None
        print(f"error: {line}" + (f"; {advice}" if advice else ""), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        _end_quietly()


def _end_quietly() -> None:
    """From here on Python only takes itself down: a Ctrl-C more would print a traceback of that."""
    if threading.current_thread() is threading.main_thread():
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def standard_input(option: str, *, binary: bool) -> BinaryIO:
    """Standard input, for an option that was given as `-`.

    Args:
        binary: whether bytes are expected that nobody can type.

    Raises:
        ConfigError: it is closed, or a terminal where bytes are expected.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(f"{option} - reads standard input, which is closed; pipe something in")
    if binary and sys.stdin.isatty():
        raise ConfigError(f"{option} - would read bytes from a terminal; pipe them, or name a file")
    return sys.stdin.buffer


def standard_output(option: str) -> BinaryIO:
    """Standard output, for bytes of an option that was given as `-`.

    Raises:
        ConfigError: it is closed, or a terminal.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise ConfigError(f"{option} - writes to standard output, which is closed; pipe it")
    if sys.stdout.isatty():
        raise ConfigError(f"{option} - would write bytes to a terminal; pipe it, or name a file")
    return sys.stdout.buffer


def quiet_libraries() -> None:
    """No progress bars and notices but our own. Call after parsing: it imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score names its tokenizer there


def program(module: str) -> str:
    """What a command calls itself: `latentwire NAME` where it was started so, or else its module.

    Args:
        module: such as `latentwire_fast.train`, or this and a sub-command.
    """
    command = module.removeprefix("latentwire_fast.")
    started = sys.argv[0] if sys.argv else ""
    as_one = f"latentwire {command}".replace("_", "-")
    return as_one if started.startswith("latentwire ") else module


def parse_arguments(
    kind: type[Arguments], *, prog: str, arguments: Sequence[str] | None = None
) -> Arguments:
    """The arguments of the command line. From here on libraries are quiet, and the modules of
    `--import` are imported.

    Args:
        arguments: those behind the name of a sub-command; all unless given.

    Raises:
        ConfigError: as `import_modules`.
    """
    args = tyro.cli(kind, prog=program(prog), args=arguments)
    quiet_libraries()
    import_modules(getattr(args, "imports", ()))
    return args


def check_one_of(options: Mapping[str, object]) -> None:
    """Raise unless exactly one of these options was given.

    Args:
        options: what was given, None for nothing, by how the option is written.

    Raises:
        ConfigError: none, or several.
    """
    given = [option for option, value in options.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(options)
        raise ConfigError(
            f"give {names}" if not given else f"{' and '.join(given)}: give one of them"
        )


def process_of_torchrun() -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine; (0, 1, 0) for a
    process that `torchrun` did not start."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, processes, local = (int(os.environ.get(name, value)) for name, value in names.items())
    return rank, processes, local


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a module be called like the function of its own name.

    `latentwire_fast.train` is a function of the public face and a module to run with `python -m`.
    Importing a module puts it into the package under its name, in the place of anything else, and
    nobody can say beforehand who imports it first. So the package always holds the module, and
    calling it calls the function.

    Args:
        module: its `__name__`.
    """

    class CallableModule(ModuleType):
        __call__ = staticmethod(function)
        __signature__ = inspect.signature(function)  # for `help` and editors

    sys.modules[module].__class__ = CallableModule


def import_modules(names: Sequence[str]) -> None:
    """Import the modules of `--import`: parts from outside the package register themselves there.

    Raises:
        ConfigError: no such module.
    """
    advice = (
        "give the name of a module without .py, such as my_parts; it must be in the current folder "
        "or on PYTHONPATH"
    )
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"--import {name!r} is no module's name; {advice}")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and imports what is not: the traceback says where
            raise ConfigError(f"--import {name}: {error}; {advice}") from None


def choose_device(name: str | None, *, option: str = "--device", number: int = 0) -> torch.device:
    """The device of that name; without one the accelerator that torch sees, or else the CPU.

    Args:
        option: what the name was given as, for messages.
        number: of this process on this machine: each takes an accelerator of its own where there
            are enough, unless a name is given.

    Raises:
        ConfigError: torch knows no such device, or this machine has not got it.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
    if name is None:
        if accelerator is None or not number:
            return accelerator or torch.device("cpu")
        return torch.device(accelerator.type, number % torch.accelerator.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{option} {name!r} is no device; this machine has {found}") from None
    if device.type != "cpu":
        count = torch.accelerator.device_count() if accelerator is not None else 0
        if accelerator is None or device.type != accelerator.type:
            raise ConfigError(f"{option} {name}: torch sees no such device here; it has {found}")
        if device.index is not None and device.index >= count:
            raise ConfigError(
                f"{option} {name}: there are {count} of them here, counted from 0; take a lower "
                "number"
            )
    elif device.index:
        raise ConfigError(f"{option} {name}: there is one CPU device; write cpu")
    return device


def check_question(question: str) -> None:
    """Raise unless a question from the command line is text.

    Raises:
        ConfigError: empty, or bytes that are not UTF-8.
    """
    if not question.strip():
        raise ConfigError("the question is empty; write one behind --question")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--question {question!r} is not UTF-8 text") from None


def parse_pairs(pairs: Sequence[str], *, option: str) -> dict[str, str]:
    """`NAME=SOURCE` options to a dict in their order.

    Raises:
        ConfigError: not of that form, or a name given twice.
    """
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, separator, source = pair.partition("=")
        if not (name and separator and source):
            raise ConfigError(
                f"{option} {pair!r}: expected NAME=SOURCE, such as llama=path/to/model"
            )
        if name in parsed:
            raise ConfigError(f"{option}: {name!r} is given twice")
        parsed[name] = source
    return parsed
