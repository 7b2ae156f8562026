"""Tables of parts: what can be registered, and under which name settings are found again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.bottlenecks import PARTS
from latentwire_fast.models.bottlenecks.uniform import UniformQuantizer
from latentwire_fast.registry import Registry


class Finer(UniformQuantizer):
    """A part with settings of its own."""

    @dataclass(frozen=True)
    class Config(UniformQuantizer.Config):
        """The same settings, and another name."""


class Unsettled(UniformQuantizer):
    """A part with another part's settings."""


@pytest.fixture
def table() -> Registry:
    return Registry("bottleneck", "latentwire_fast.models.bottlenecks")


def test_a_registered_part_is_found_by_its_name_and_by_its_settings(table: Registry) -> None:
    table.register("finer", Finer)
    table.register("finer", Finer)  # as a module that is imported twice does
    table.register("uniform", UniformQuantizer)
    assert table.names() == [*PARTS, "finer"]
    assert table["finer"] is table.part_of(Finer.Config()) is Finer
    assert table.part_of(UniformQuantizer.Config()) is UniformQuantizer


def test_a_name_stands_for_one_part(table: Registry) -> None:
    table.register("finer", Finer)
    for name in ("uniform", "finer"):
        with pytest.raises(ConfigError, match=f"the name '{name}' is another bottleneck's; choose"):
            table.register(name, Unsettled)


def test_settings_stand_for_one_part(table: Registry) -> None:
    """Otherwise a run would silently be built with the first part of two."""
    with pytest.raises(ConfigError, match="Unsettled has the Config of 'uniform'; define a sett"):
        table.register("unsettled", Unsettled)
    table.register("finer", Finer)
    with pytest.raises(ConfigError, match="Finer has the Config of 'finer'; define a settings"):
        table.register("finest", Finer)
    assert table.names() == [*PARTS, "finer"]


def test_a_part_has_settings(table: Registry) -> None:
    with pytest.raises(ConfigError, match="bottleneck 'none': object has no Config; define"):
        table.register("none", object)
    assert table.names() == [*PARTS]
