"""The folder of a saved model: a config.json with the sha256 of every other file and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latentwire_fast.config.schema import AttachmentConfig, BottleneckConfig, EncoderConfig, Mode
from latentwire_fast.config.serialization import from_json, to_json
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.atomic import file_entry
from latentwire_fast.files.json_files import read_json
from latentwire_fast.readers.card import ReaderCard

FORMAT_VERSION = 2


@dataclass(frozen=True)
class SavedModel:
    """What config.json says of a model.

    Attributes:
        readers: a card of each, by name.
        lora: names of the readers that have low-rank updates.
        private_slots: how many slots are a reader's own, by its name.
    """

    mode: Mode
    encoder: EncoderConfig
    bottleneck: BottleneckConfig
    attachments: tuple[AttachmentConfig, ...]
    readers: Mapping[str, ReaderCard]
    lora: tuple[str, ...] = ()
    private_slots: Mapping[str, int] = field(default_factory=dict)


def write(
    folder: Path, model: SavedModel, *, trained_parameters: int, files: Iterable[str]
) -> None:
    """Write config.json, once the files that it lists are there."""
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "mode": model.mode,
        "encoder": to_json(model.encoder),
        "bottleneck": to_json(model.bottleneck),
        "attachments": to_json(model.attachments),
        "readers": {name: asdict(card) for name, card in model.readers.items()},
        "trained_parameters": trained_parameters,
    }
    if model.lora:
        config["lora"] = list(model.lora)
    if model.private_slots:
        config["private_slots"] = dict(model.private_slots)
    config["files"] = {name: file_entry(folder / name) for name in files}
    config["sha256"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read(folder: Path) -> SavedModel:
    """The inverse of `write`.

    Raises:
        CheckpointError: a file is missing or damaged, or of another format version; or what stands
            there is no model that can be built here.
    """
    config = _read_config(folder)
    kinds = tuple[AttachmentConfig, ...]
    try:
        return SavedModel(
            mode=config["mode"],
            encoder=from_json(EncoderConfig, config["encoder"], where="encoder"),
            bottleneck=from_json(BottleneckConfig, config["bottleneck"], where="bottleneck"),
            attachments=from_json(kinds, config["attachments"], where="attachments"),
            readers={name: ReaderCard.from_json(card) for name, card in config["readers"].items()},
            lora=tuple(config.get("lora", ())),
            private_slots=config.get("private_slots", {}),
        )
    except (ConfigError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ConfigError) else repr(error)
        raise CheckpointError(
            f"{folder} was saved by another version of latentwire-fast, or with a part that is "
            f"not registered here ({reason}); register the part, train the model again, or use "
            "the version that saved it"
        ) from None


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a config.json's values but this one."""
    values = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
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
