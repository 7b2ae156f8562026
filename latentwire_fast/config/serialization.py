"""A configuration as JSON and back. Every run folder holds its own as `config.json`, and reports
name it by its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from latentwire_fast.config.base import PartSettings, Settings
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.run_folder import RunFolder


def to_json(value: Any) -> Any:
    """Settings, or what a field of them holds, as JSON-ready values.

    Settings of a registered part begin with its `kind`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if isinstance(value, PartSettings) else {}
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {**kind, **fields}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def config_hash(config: Any) -> str:
    """sha256 of the canonical JSON of a configuration."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()


def from_json(kind: Any, data: Any, *, where: str = "") -> Any:
    """The inverse of `to_json` for a value of this type; what is left out takes its default.

    Args:
        kind: a settings class, or the type that a field declares.
        where: the dotted path of the value, for messages.

    Raises:
        ConfigError: an unknown or missing key, an unknown part, or a value that cannot be.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if data is None and type(None) in inner:
            return None
        kind = next(part for part in inner if part is not type(None))
        return from_json(kind, data, where=where)
    if origin is tuple and isinstance(data, Sequence) and not isinstance(data, str):
        kinds = inner[:1] * len(data) if inner[1:] == (...,) else inner
        if len(kinds) != len(data):
            raise ConfigError(f"{where}: {len(data)} values, expected {len(kinds)}")
        pairs = enumerate(zip(kinds, data, strict=True))
        return tuple(from_json(part, item, where=f"{where}[{i}]") for i, (part, item) in pairs)
    if origin is dict and isinstance(data, Mapping):
        return {key: from_json(inner[1], v, where=f"{where}.{key}") for key, v in data.items()}
    if isinstance(kind, type) and issubclass(kind, Settings):
        return _settings_from_json(kind, data, where)
    return data


def _settings_from_json(kind: type[Settings], data: Any, where: str) -> Settings:
    place = where or "configuration"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: {data!r}, expected an object of settings")
    values = dict(data)
    if issubclass(kind, PartSettings):
        kind = _part_settings(kind, values, place)
    hints = {k: v for k, v in get_type_hints(kind).items() if get_origin(v) is not ClassVar}
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(f"{place}: does not fit this version, unknown {', '.join(unknown)}")
    prefix = f"{where}." if where else ""
    parsed = {key: from_json(hints[key], v, where=prefix + key) for key, v in values.items()}
    try:
        return kind(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None
    except TypeError as error:
        raise ConfigError(f"{place}: does not fit this version: {error}") from None


def _part_settings(kind: type[PartSettings], values: dict[str, Any], place: str) -> type[Settings]:
    """The settings class that the `kind` among JSON values names; it is taken out of them."""
    if "kind" not in values:
        raise ConfigError(f'{place}: its "kind" is missing')
    name = values.pop("kind")
    if not isinstance(name, str):
        raise ConfigError(f'{place}: "kind" is {name!r}, expected the name of a part')
    try:
        part = kind.registry[name]
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    settings: type[Settings] = part.Config
    return settings


def run_config_from_json(data: Any) -> RunConfig:
    """A run's configuration from its JSON form.

    Raises:
        ConfigError: as `from_json`.
    """
    config: RunConfig = from_json(RunConfig, data)
    return config


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises:
        CheckpointError: there is none, or it is not JSON. ConfigError: it does not fit.
    """
    advice = f"is {run_dir} a run folder?"
    path = RunFolder(run_dir).config
    data = read_json(path, error=CheckpointError, advice=advice)
    try:
        return run_config_from_json(data)
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {error}; if another version wrote it, train the run again with this one"
        ) from None
