"""Local paths of a configuration made absolute: a run goes on from any working directory.

What names something else stays as it is: `testbed:llama`, a hub id, `hub:squad`. As transformers
has it, what exists as a path is a path.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.sources import map_paths


def absolute_paths(config: RunConfig) -> RunConfig:
    """A configuration whose readers, encoder, data and base are found from anywhere.

    Raises:
        DataError: the absolute path of a data file holds a comma, which separates sources.
    """
    readers = {
        name: replace(reader, source=_absolute(reader.source))
        for name, reader in config.readers.items()
    }
    encoder = config.encoder
    if encoder.source is not None:
        encoder = encoder.with_source(_absolute(encoder.source))
    data = replace(config.data, source=map_paths(config.data.source, _absolute))
    base = None if config.base is None else _absolute(config.base)
    return replace(config, readers=readers, encoder=encoder, data=data, base=base)


def _absolute(source: str) -> str:
    # Not `resolve`: a link may be the name under which a user moves a model about.
    return os.path.abspath(source) if Path(source).exists() else source  # noqa: PTH100
