"""LatentWire Fast: one prompt as a payload of a few hundred bytes, read by many frozen LLMs.

    import latentwire_fast as lw

    model = lw.Interlingua.from_pretrained("runs/demo/model")

The names of `__all__` are the public face; `docs/api.md` shows each of them. They are imported when
they are first used: importing the package alone imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from latentwire_fast import ops, wire
    from latentwire_fast.config.presets import load_preset
    from latentwire_fast.config.schema import PromptConfig, ReaderConfig, RunConfig
    from latentwire_fast.evaluate import evaluate
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.prompts.builder import PromptBuilder, Turn
    from latentwire_fast.readers.reader import Reader, load_readers
    from latentwire_fast.serving import Receiver
    from latentwire_fast.train import train

__version__ = "0.1.0"

__all__ = [
    "Interlingua",
    "PromptBuilder",
    "PromptConfig",
    "Reader",
    "ReaderConfig",
    "Receiver",
    "RunConfig",
    "Turn",
    "evaluate",
    "load_preset",
    "load_readers",
    "ops",
    "train",
    "wire",
]

_MODULE_OF = {
    "Interlingua": "models.interlingua",
    "PromptBuilder": "prompts.builder",
    "PromptConfig": "config.schema",
    "Reader": "readers.reader",
    "ReaderConfig": "config.schema",
    "Receiver": "serving",
    "RunConfig": "config.schema",
    "Turn": "prompts.builder",
    "load_preset": "config.presets",
    "load_readers": "readers.reader",
}
# `train` and `evaluate` are modules too, for `python -m`. They can be called like the functions in
# them (`cli.make_callable`), so that it is the same which of the two a name stands for.
_MODULES = {"evaluate", "ops", "train", "wire"}

# The Triton kernels lie in `kernels/` at the repository root and are installed as
# `latentwire_fast.kernels`. In a wheel they are beside this file. In a checkout, installed or not,
# they are not, and the root joins the places where submodules are looked for. The folder has no
# __init__.py: a regular top-level package `kernels` would shadow the Hugging Face package of that
# name, which transformers imports.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    """A name of the public face, imported now (PEP 562); called once per name."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
