"""The commands behind a report: those that reproduce the run, and those under tables and figures.

Commands name the folder `runs/NAME` whatever folder a run was in: it is another one elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.serialization import to_json
from latentwire_fast.evaluation.provenance import command


def evaluate_command(run: Mapping[str, Any]) -> str:
    """The command that made the scores: as recorded, or the plain one of an older evaluation."""
    return run.get("command") or command("latentwire_fast.evaluate", run.get("name") or "NAME")


def train_command(run: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The command that trained the run: a preset by its name, any other by its config.json."""
    what = run.get("preset") if _is_preset(run, config) else "config.json"
    return f"python -m latentwire_fast.train {what} --run runs/{run.get('name') or 'NAME'}"


def commands(run: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The lines that reproduce the run and its report."""
    commit, changed, _ = (run.get("commit") or "").partition("+changes")
    lines = [train_command(run, config), evaluate_command(run)]
    if not _is_preset(run, config):
        lines.insert(0, "# with the config.json of the run folder:")
    if commit:
        lines.insert(0, f"git checkout {commit}")
    if changed:
        lines.insert(1, "# with the changes that were not committed")
    return lines


def _is_preset(run: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    preset = run.get("preset")
    return preset in PRESETS and to_json(PRESETS[preset]()) == config
