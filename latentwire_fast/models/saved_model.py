"""The folder of a saved model: a config.json with the sha256 of every other file and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentwire_fast.errors import CheckpointError
from latentwire_fast.files.atomic import file_entry
from latentwire_fast.files.json_files import read_json

FORMAT_VERSION = 2


def write_config(folder: Path, values: Mapping[str, Any], *, files: Iterable[str]) -> None:
    """Write config.json, once the files that it lists are there."""
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **values,
        "files": {name: file_entry(folder / name) for name in files},
    }
    config["sha256"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a config.json's values but this one."""
    values = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json, once it and the files that it lists are known to be undamaged.

    Raises:
        CheckpointError: a file is missing or damaged, or of another format version.
    """
    path = folder / "config.json"
    config = read_json(path, error=CheckpointError, advice=f"is {folder} a saved model?")
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is no saved model of format version {FORMAT_VERSION}"
            if not isinstance(version, int)
            else f"{path} has format version {version}, this release reads {FORMAT_VERSION}; train "
            "the model again, or use the release of latentwire-fast that saved it"
        )
    if config.get("sha256") != config_digest(config):
        raise CheckpointError(f"{path} was changed after it was written; copy the folder again")
    for name, entry in config["files"].items():
        file = folder / name
        if not file.is_file() or file_entry(file) != entry:
            raise CheckpointError(
                f"{file} is missing or damaged (config.json has its sha256); copy the folder again"
            )
    return config
