"""Settings as frozen dataclasses: their fields have the types that they declare.

`Settings` is a piece of a run's configuration. `PartSettings` is the `Config` of a registered part
(`registry.py`): JSON says which with `"kind"`.
"""

from __future__ import annotations

import math
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from latentwire_fast.errors import ConfigError
from latentwire_fast.registry import Registry


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as the fields below declare them."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and -math.inf < value < math.inf  # no setting is NaN or infinite
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_wanted, inner))
    if hint is type(None):
        return "None"
    return str(getattr(hint, "__name__", hint)).replace("float", "finite float")


class Settings:
    """A piece of the configuration: its fields have the types that they declare."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is ClassVar:
                continue
            value = getattr(self, name)
            if not _fits(value, hint):
                raise ConfigError(f"{name}={value!r}, expected {_wanted(hint)}")

    def at_least_one(self, *names: str) -> None:
        """Raise unless these are None or at least 1."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value}, expected at least 1")


class PartSettings(Settings):
    """Settings of one registered part.

    Attributes:
        registry: the table that its class is in.
    """

    registry: ClassVar[Registry]

    @property
    def kind(self) -> str:
        """The name that the part is registered by."""
        return self.registry.name_of(self)

    def check(self, run: Any) -> None:
        """Raise unless the rest of a run has what the part needs; it calls that of parts within.

        Args:
            run: the `RunConfig`.

        Raises:
            ConfigError: it has not; the message says what is missing.
        """
