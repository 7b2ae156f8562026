"""A configuration as JSON and back. Every run folder holds its own as `config.json`, and reports
name it by its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from latentwire_fast.config.schema import (
    AdapterConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    OptimConfig,
    QuantizerConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.json_files import read_json


def to_json(config: Any) -> Any:
    """A configuration as JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Any) -> str:
    """sha256 of the canonical JSON of a configuration."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()


def run_config_from_json(data: Any) -> RunConfig:
    """The inverse of `to_json` for a RunConfig; what is left out takes its default.

    Raises:
        ConfigError: an unknown or missing key, or a value that cannot be.
    """
    parts = {
        "encoder": EncoderConfig,
        "quantizer": QuantizerConfig,
        "adapter": AdapterConfig,
        "data": DataConfig,
        "optim": OptimConfig,
        "evaluation": EvalConfig,
    }
    try:
        values = {**data}
        for key, kind in parts.items():
            if key in values:
                options = {**values[key]}
                if key == "evaluation" and "bits" in options:
                    options["bits"] = tuple(options["bits"])
                values[key] = kind(**options)
        values["readers"] = {k: ReaderConfig(**v) for k, v in values.get("readers", {}).items()}
        stages = []
        for stage in values.get("stages", ()):
            facts = tuple(map(tuple, stage.get("facts", ())))
            stages.append(StageConfig(**{**stage, "facts": facts}))
        values["stages"] = tuple(stages)
        return RunConfig(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"configuration does not fit this version: {error}") from None


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises:
        CheckpointError: there is none, or it is not JSON. ConfigError: it does not fit.
    """
    advice = f"is {run_dir} a run folder?"
    data = read_json(run_dir / "config.json", error=CheckpointError, advice=advice)
    return run_config_from_json(data)
