"""Tables of parts: a name stands for a class in a file of its own, imported when it is asked for.

    ENCODERS["lm"]                              # the class, of latentwire_fast/models/encoders/
    ENCODERS.config("lm", frozen=True)          # its settings
    ENCODERS.register("mine", MyEncoder)        # a part from outside the package

A part is one class in one file. It owns its settings (`Config`, a dataclass, with its checks), its
building and its limits. Its line in the folder's `PARTS` table is all that names it.
"""

from __future__ import annotations

import importlib
from typing import Any

from latentwire_fast.errors import ConfigError


class Registry:
    """The parts of one kind by name.

    Args:
        kind: what they are, for messages: `encoder`.
        folder: the module whose `PARTS` holds a line `"name": "module:Class"` for each.
    """

    def __init__(self, kind: str, folder: str) -> None:
        self.kind = kind
        self.folder = folder
        self._added: dict[str, type] = {}

    def names(self) -> list[str]:
        """Every part's name, those of the package first, in the order of their table."""
        return [*self._table(), *self._added]

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._table()

    def __getitem__(self, name: str) -> Any:
        """The class of a part.

        Raises:
            ConfigError: there is none of that name.
        """
        if name in self._added:
            return self._added[name]
        table = self._table()
        if name not in table:
            raise ConfigError(f"no {self.kind} {name!r}; there are {', '.join(self.names())}")
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def register(self, name: str, part: type) -> None:
        """Add a part from outside the package, for as long as this process runs.

        Raises:
            ConfigError: another part has that name; or the class has no settings class of its own,
                by which a configuration tells it from other parts.
        """
        if name in self:
            if self[name] is not part:
                raise ConfigError(f"the name {name!r} is another {self.kind}'s; choose another")
            return
        config = getattr(part, "Config", None)
        owner = self._owner(config) if isinstance(config, type) else None
        if owner is not None or not isinstance(config, type):
            found = f"has the Config of {owner!r}" if owner else "has no Config"
            raise ConfigError(
                f"{self.kind} {name!r}: {part.__name__} {found}; define a settings class Config in "
                "it, which may be a subclass of another part's"
            )
        self._added[name] = part

    def config(self, name: str, **options: Any) -> Any:
        """The settings of a part, defaults where nothing is given.

        Raises:
            ConfigError: no such part, or a setting that it does not have.
        """
        settings = self[name].Config
        try:
            return settings(**options)
        except TypeError as error:
            raise ConfigError(f"{self.kind} {name!r}: {error}") from None

    def name_of(self, config: object) -> str:
        """The name of the part that settings belong to.

        Raises:
            ConfigError: they are no registered part's.
        """
        name = self._owner(type(config))
        if name is None:
            raise ConfigError(
                f"{type(config).__qualname__} is the Config of no registered {self.kind}; register "
                "its class first"
            )
        return name

    def part_of(self, config: object) -> Any:
        """The class that settings belong to."""
        return self[self.name_of(config)]

    def _owner(self, config: type) -> str | None:
        """The name of the part that has this settings class; None where no part has."""
        place = f"{config.__module__}:{config.__qualname__.removesuffix('.Config')}"
        for name, part in self._table().items():
            if part == place:  # nothing is imported for it
                return name
        for name, added in self._added.items():
            if added.Config is config:  # type: ignore[attr-defined]
                return name
        return None

    def _table(self) -> dict[str, str]:
        table: dict[str, str] = importlib.import_module(self.folder).PARTS
        return table


ENCODERS = Registry("encoder", "latentwire_fast.models.encoders")
POOLERS = Registry("pooler", "latentwire_fast.models.poolers")
BOTTLENECKS = Registry("bottleneck", "latentwire_fast.models.bottlenecks")
ADAPTERS = Registry("adapter", "latentwire_fast.models.adapters")
ATTACHMENTS = Registry("reader attachment", "latentwire_fast.models.attachments")
OBJECTIVES = Registry("objective", "latentwire_fast.objectives")
SCHEDULES = Registry("schedule", "latentwire_fast.schedules")
DATA_SETS = Registry("data set", "latentwire_fast.data.sets")
METHODS = Registry("evaluation method", "latentwire_fast.evaluation.methods")
HYPOTHESES = Registry("hypothesis", "latentwire_fast.evaluation.hypotheses")
PATTERNS = Registry("pattern", "latentwire_fast.evaluation.patterns")
