"""Modules say which of their parameters are tables, and which of their modules a pretrained LM."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.schema import ReaderConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.training.builders import build_model
from runs import changed

# What tables were recognised by before modules declared them.
NAMES = ("embed", "slot", "quer", "memory", "position")
NARROWEST = 16  # a matrix narrower than this is trained like a table anyway


def declared(model: nn.Module, attribute: str) -> set[str]:
    """Full names of what the modules of a model name in this attribute."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, attribute, ())
    }


@pytest.fixture(params=[name for name in PRESETS if name.startswith("testbed")])
def model(
    request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path
) -> tuple[str, Interlingua]:
    config = PRESETS[request.param]()
    if config.encoder.source is not None:
        config = changed(config, encoder={"source": str(llama_folder)})
    folders = {"llama": llama_folder, "qwen": qwen_folder}
    sources = {name: ReaderConfig(str(folder)) for name, folder in folders.items()}
    config = changed(config, readers=sources)
    return request.param, build_model(config, load_readers(config.readers))


def test_tables_are_those_that_were_known_by_their_names(model: tuple[str, Interlingua]) -> None:
    tables = declared(model[1], "table_parameters")
    tables |= {
        f"{prefix}.weight"
        for prefix, module in model[1].named_modules()
        if isinstance(module, nn.Embedding)
    }
    parameters = dict(model[1].named_parameters())
    assert tables - {"encoder.pooler.query_offsets"} <= parameters.keys()
    matrices = {n for n, p in parameters.items() if p.dim() == 2 and min(p.shape) >= NARROWEST}
    by_name = {name for name in matrices if any(part in name for part in NAMES)}
    assert tables & matrices == by_name


def test_the_pretrained_lm_is_the_encoders_core(model: tuple[str, Interlingua]) -> None:
    name, interlingua = model
    expected = set() if name == "testbed_byte" else {"encoder.core"}
    assert declared(interlingua, "pretrained_modules") == expected
