"""A sweep: one preset, changed in many ways, each with several seeds. It is read from a JSON file.

    {
      "preset": "testbed_context",
      "seeds": [0, 1],
      "set": ["stages.match.steps=100"],
      "groups": {"distilled": ["stages.answer.objectives=..."]},
      "variants": {"base": [], "4 bits": ["bottleneck.bits=4"], "kd": ["@distilled"]},
      "grid": {"encoder.latents": [12, 8], "kd": {"off": [], "on": ["@distilled"]}}
    }

Every list holds assignments as `train --set` takes them (`config/assignments.py`), or `@NAME`,
which stands for a group of them. `grid` adds a variant for every combination of its axes: an axis
is a path with a list of values, or a name with lists of assignments by label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from latentwire_fast.config.assignments import with_assignments
from latentwire_fast.config.base import Settings, require
from latentwire_fast.config.presets import load_preset
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.serialization import from_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.json_files import read_json

Assigned = tuple[str, ...]  # assignments, and groups as @NAME
NAME = re.compile(r"\w[\w.+=-]*")  # of a variant: its folder has the same name


@dataclass(frozen=True)
class Sweep(Settings):
    """Runs of one preset that differ in single fields.

    Attributes:
        preset: a preset, or a configuration as a .json file.
        seeds: each variant is trained once with each.
        assignments: `set` in the file: what all variants have in common.
        groups: assignments by a name that stands for them.
        variants: by name, what is different in it; those of a grid come last.
        base: the variant that the others are compared to; None: the first one.
    """

    preset: str
    seeds: tuple[int, ...] = (0,)
    assignments: Assigned = ()
    groups: dict[str, Assigned] = field(default_factory=dict)
    variants: dict[str, Assigned] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.seeds), "seeds: at least one is needed")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds={self.seeds}: one is there twice")
        require(bool(self.variants), "variants: at least one is needed, here or in a grid")
        for name in self.variants:
            require(
                NAME.fullmatch(name) is not None,
                f"variants: {name!r} names a folder; use letters, digits and _ . + = - only",
            )
        require(
            self.base is None or self.base in self.variants,
            f"base={self.base!r} is none of the variants",
        )

    @property
    def compared_to(self) -> str:
        """The variant that the others are compared to."""
        return self.base or next(iter(self.variants))

    def assigned(self, variant: str) -> list[str]:
        """All assignments of a variant, its groups written out."""
        return [*self._flat(self.assignments), *self._flat(self.variants[variant])]

    def _flat(self, entries: Sequence[str], within: Sequence[str] = ()) -> list[str]:
        flat: list[str] = []
        for entry in entries:
            name = entry.removeprefix("@")
            if name == entry:
                flat.append(entry)
                continue
            require(
                name in self.groups,
                f"there is no group {entry!r}; there are {', '.join(self.groups) or 'none'}",
            )
            require(name not in within, f"group {entry!r} holds itself")
            flat += self._flat(self.groups[name], (*within, name))
        return flat


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep.

    Attributes:
        arguments: of `python -m latentwire_fast.train`, without the run folder.
        imports: those of them that import parts from outside the package.
        config: what they stand for.
    """

    variant: str
    seed: int
    arguments: tuple[str, ...]
    imports: tuple[str, ...]
    config: RunConfig

    @property
    def name(self) -> str:
        """Variant and seed, which is also the run's folder in that of the sweep."""
        return f"{self.variant}/seed{self.seed}"


def read_sweep(path: Path) -> Sweep:
    """A sweep from its JSON file.

    Raises:
        ConfigError: no such file, not JSON, or not a sweep.
    """
    data = read_json(path, error=ConfigError)
    try:
        return sweep_from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def sweep_from_json(data: Any) -> Sweep:
    """A sweep from its JSON form.

    Raises:
        ConfigError: an unknown key, a value of another type, two variants of one name.
    """
    require(isinstance(data, Mapping), f"a sweep is an object of settings, not {data!r:.60}")
    values = dict(data)
    require("assignments" not in values, "unknown assignments; they are named set")
    if "set" in values:
        values["assignments"] = values.pop("set")
    points = _grid(values.pop("grid", {}))
    variants = values.get("variants", {})
    require(isinstance(variants, Mapping), "variants: expected lists of assignments by name")
    for name, texts in variants.items():
        require(isinstance(texts, list), f"variants: {name}: expected a list of assignments")
    require("preset" in values, "preset is missing; name one, or a configuration as a .json file")
    twice = sorted(variants.keys() & points.keys())
    require(not twice, f"grid: it has a variant {', '.join(twice)} too; rename that in `variants`")
    values["variants"] = {**variants, **points}
    sweep: Sweep = from_json(Sweep, values)
    return sweep


def _grid(axes: Any) -> dict[str, list[str]]:
    """The variants of a grid, named after their place on each axis."""
    require(isinstance(axes, Mapping), "grid: expected an object of axes")
    if not axes:
        return {}
    levels = [_axis(name, axis) for name, axis in axes.items()]
    return {
        "-".join(label for label, _ in point): [text for _, texts in point for text in texts]
        for point in product(*levels)
    }


def _axis(name: str, axis: Any) -> list[tuple[str, list[str]]]:
    """The labels of an axis, each with its assignments."""
    if isinstance(axis, Mapping):
        for label, texts in axis.items():
            is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            require(is_list, f"grid: {name}.{label}: expected a list of assignments")
        found = [(f"{name}{label}", list(texts)) for label, texts in axis.items()]
    else:
        require(
            isinstance(axis, list) and all(isinstance(v, str | int | float) for v in axis),
            f"grid: {name}: expected a list of values, or lists of assignments by label",
        )
        last = name.rpartition(".")[2]
        texts = [v if isinstance(v, str) else json.dumps(v) for v in axis]
        found = [(f"{last}{text}", [f"{name}={text}"]) for text in texts]
    require(bool(found), f"grid: {name} has no values")
    labels = [label for label, _ in found]
    require(len({*labels}) == len(labels), f"grid: {name} has one value twice")
    return found


def planned_runs(sweep: Sweep, *, imports: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run of a sweep, the first seed of all variants before the second one.

    Args:
        imports: modules that hold parts from outside the package.

    Raises:
        ConfigError: a variant is no configuration that can be trained.
    """
    preset = load_preset(sweep.preset)
    imported = tuple(x for module in imports for x in ("--import", module))
    configs, options = {}, {}
    for variant in sweep.variants:
        try:
            assigned = sweep.assigned(variant)
            configs[variant] = with_assignments(preset, assigned)
            require(configs[variant].seed == preset.seed, "it sets seed; write that to `seeds`")
        except ConfigError as error:
            raise ConfigError(f"variant {variant!r}: {error}") from None
        options[variant] = [x for text in assigned for x in ("--set", text)]
    return [
        PlannedRun(
            variant,
            seed,
            (sweep.preset, "--seed", str(seed), *options[variant], *imported),
            imported,
            replace(config, seed=seed),
        )
        for seed in sweep.seeds
        for variant, config in configs.items()
    ]
