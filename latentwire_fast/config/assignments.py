"""Single fields of a configuration, as the command line sets them: `PATH=VALUE`.

    readers.llama.load_in_4bit=true      stages.2.steps=10          stages.answer.lr=0.5
    encoder.pooler.kind=spans            optim.muon_lr=null         evaluation.bits=[6,4]

A path goes through the configuration's JSON form (`train PRESET --print-config`). A step into a
list is a number counted from 0, or the `name` or `kind` of an entry. A value is JSON; what is no
JSON is text. A part that is given another `kind` keeps the settings that both kinds have, if they
are not the first kind's defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from latentwire_fast.config.base import PartSettings
from latentwire_fast.config.schema import ReaderConfig, RunConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError

# What a trained run can be read with anew: all else is in its weights.
OF_A_TRAINED_RUN = ("readers", "evaluation")
OF_ITS_DATA = ("facts", "language")  # and these of the texts that it is scored on


class NothingThere(ConfigError):
    """There is nothing within a field to set, for it is null.

    Attributes:
        behind: how many steps of the path are within it.
    """

    def __init__(self, step: str, *, behind: int) -> None:
        super().__init__(f"{step} is null")
        self.behind = behind


def with_assignments(
    config: RunConfig,
    assignments: Sequence[str] = (),
    *,
    reader_options: Sequence[str] = (),
    trained: bool = False,
) -> RunConfig:
    """A configuration with single fields set.

    Args:
        assignments: `PATH=VALUE` each; a later one wins.
        reader_options: `NAME.FIELD=VALUE` each, short for `readers.NAME.FIELD=VALUE`.
        trained: the configuration is that of a trained run. Only what `OF_A_TRAINED_RUN` names can
            be set, and a reader's `dtype` is what it computes in: its weights are those that the
            run was trained for.

    Raises:
        ConfigError: no such field, or a value that it cannot have.
    """
    if not (assignments or reader_options):
        return config
    data = to_json(config)
    for option, texts in {"--set": assignments, "--reader-options": reader_options}.items():
        for text in texts:
            path, separator, value = text.partition("=")
            if not (path and separator):
                raise ConfigError(f"{option} {text!r}: expected PATH=VALUE, such as seed=3")
            steps = path.split(".")
            if option == "--reader-options":
                _check_reader_option(steps, text)
                steps = ["readers", *steps]
            if trained:
                steps = _for_a_trained_run(steps, option, text)
            try:
                _assign(RunConfig, data, steps, parse_value(value))
            except NothingThere as error:
                whole, example = steps[: len(steps) - error.behind], parse_value(value)
                for step in reversed(steps[len(whole) :]):
                    example = {step: example}
                raise ConfigError(
                    f"{option} {text!r}: {error}; set it as a whole, such as "
                    f"{'.'.join(whole)}={json.dumps(example)}"
                ) from None
            except ConfigError as error:
                raise ConfigError(f"{option} {text!r}: {error}") from None
    try:
        return run_config_from_json(data)
    except ConfigError as error:
        given = ", ".join(repr(text) for text in (*assignments, *reader_options))
        raise ConfigError(f"with {given}: {error}") from None


def _check_reader_option(steps: Sequence[str], text: str) -> None:
    if len(steps) != 2:
        fields = ", ".join(sorted(_fields(ReaderConfig)))
        raise ConfigError(
            f"--reader-options {text!r}: expected NAME.FIELD=VALUE, such as llama.dtype=bfloat16; "
            f"the fields are {fields}"
        )


def _for_a_trained_run(steps: list[str], option: str, text: str) -> list[str]:
    is_of_data = steps[0] == "data" and steps[1:] in [[name] for name in OF_ITS_DATA]
    if not is_of_data and (steps[0] not in OF_A_TRAINED_RUN or steps[-1] == "source"):
        raise ConfigError(
            f"{option} {text!r}: that is fixed when a run is trained; what can be set then is "
            f"{' and '.join(OF_A_TRAINED_RUN)}, without the readers' sources, and data."
            f"{' and data.'.join(OF_ITS_DATA)} of what it is scored on"
        )
    is_dtype = steps[0] == "readers" and steps[2:] == ["dtype"]
    return [*steps[:2], "compute_dtype"] if is_dtype else steps


def parse_value(value: str) -> Any:
    """A value of the command line: JSON, or else text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _assign(hint: Any, node: Any, steps: Sequence[str], value: Any) -> None:
    """Set a value in the JSON of a field of this type."""
    step, rest = steps[0], steps[1:]
    hint = _without_none(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is dict:
        key: Any
        key, rest = _entry(node, steps)
        if key not in node and inner[1] is ReaderConfig:
            raise ConfigError(_unknown(step, node))
        hint = inner[1]
    elif origin is tuple:
        key = _place(node, step)
        hint = inner[0]
    elif dataclasses.is_dataclass(hint):
        settings = _settings_of(hint, node)
        if step == "kind" and issubclass(settings, PartSettings):
            if rest:
                raise ConfigError("'kind' has no fields")
            _change_kind(settings, node, value)
            return
        fields = _fields(settings)
        if step not in fields:
            kind = ["kind"] if issubclass(settings, PartSettings) else []
            raise ConfigError(_unknown(step, [*kind, *fields]))
        key = step
        hint = get_type_hints(settings)[step]
        if step not in node:
            node[step] = to_json(_default(fields[step]))
    else:
        raise ConfigError(f"there is nothing within it to set ({step!r})")
    if not rest:
        node[key] = value
    elif node[key] is None:
        raise NothingThere(step, behind=len(rest))
    else:
        _assign(hint, node[key], rest, value)


def _entry(node: dict[str, Any], steps: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The name of an object's entry, which may have dots (`kd.weight`), and the steps behind it.
    All steps are the name of a new entry, where none of this name is there."""
    for count in range(len(steps), 0, -1):
        name = ".".join(steps[:count])
        if name in node:
            return name, steps[count:]
    return ".".join(steps), []


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _settings_of(hint: Any, node: Any) -> Any:
    """The settings class that a field's JSON is of."""
    if not isinstance(node, dict):
        raise ConfigError(f"it is {node!r}; set it as a whole, as JSON")
    if issubclass(hint, PartSettings):
        return hint.registry[node.get("kind", "")].Config
    return hint


def _fields(settings: Any) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(settings)}


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _change_kind(settings: type[PartSettings], node: dict[str, Any], kind: Any) -> None:
    """Keep the values that both kinds have and somebody chose. Defaults and parts within (an
    encoder's pooler) are right for one kind: the other begins with its own."""
    if not isinstance(kind, str) or kind not in settings.registry:
        names = settings.registry.names()
        raise ConfigError(_unknown(str(kind), names))
    if kind == node["kind"]:
        return
    kept = _fields(settings.registry[kind].Config)
    before = _fields(settings)
    for name in [name for name in node if name != "kind"]:
        is_part = isinstance(node[name], dict) and "kind" in node[name]
        if name not in kept or is_part or node[name] == to_json(_default(before[name])):
            del node[name]
    node["kind"] = kind


def _place(entries: Sequence[Any], step: str) -> int:
    """The index of a list's entry, given as a number, or by its name or kind."""
    if step.isdecimal() and int(step) < len(entries):
        return int(step)
    named = [e.get("name", e.get("kind")) if isinstance(e, dict) else None for e in entries]
    if named.count(step) == 1:
        return named.index(step)
    known = ", ".join(f"{i} ({name})" if name else str(i) for i, name in enumerate(named))
    raise ConfigError(f"no entry {step!r}; there are {known or 'none'}")


def _unknown(step: str, known: Any) -> str:
    near = get_close_matches(step, known, n=3)
    if near:
        return f"there is no {step!r}; did you mean {' or '.join(near)}?"
    return f"there is no {step!r}; there are {', '.join(known)}"
