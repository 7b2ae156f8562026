"""A run's state besides its weights: that of its optimisers and of its random generators."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentwire_fast.errors import CheckpointError

logger = logging.getLogger(__name__)


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of optimisers by parameter *name*: tensors `INDEX/PARAMETER/KEY`, the rest as JSON.

    Raises:
        CheckpointError: an optimiser has a parameter without a name, or an option that is not JSON.
    """
    names = {parameter: name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    saved = []
    for index, optimizer in enumerate(optimizers):
        scalars: dict[str, dict[str, Any]] = {}
        for name, parameter in _by_name(optimizer, names).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{index}/{name}/{key}"] = value
                else:
                    scalars.setdefault(name, {})[key] = value
        groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        saved.append({"type": type(optimizer).__name__, "groups": groups, "scalars": scalars})
    return tensors, {"optimizers": saved}


def _by_name(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, nn.Parameter]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    unnamed = sum(p not in names for p in parameters)
    if unnamed:
        raise CheckpointError(
            f"{unnamed} parameters of {type(optimizer).__name__} are not among the named "
            "parameters; pass those of every trained module"
        )
    return {names[p]: p for p in parameters}


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_state`, bit-exact. Parameters may come in another order.

    Raises:
        CheckpointError: optimisers of another kind, or with other parameters; none was changed.
    """
    names = {parameter: name for name, parameter in named_parameters}
    loads = []
    found = len(state["optimizers"])
    if len(optimizers) != found:
        raise CheckpointError(
            f"the checkpoint holds {found} optimisers, this run has {len(optimizers)}; resume with "
            "the configuration of the run folder"
        )
    for index, (optimizer, saved) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        now = [sorted(names.get(p, "?") for p in g["params"]) for g in optimizer.param_groups]
        then = [sorted(group["params"]) for group in saved["groups"]]
        if (type(optimizer).__name__, now) != (saved["type"], then):
            raise CheckpointError(
                f"optimiser {index}: saved {saved['type']} of {sum(map(len, then))} parameters, "
                f"this run has {type(optimizer).__name__} of {sum(map(len, now))} (or other names "
                "or groups); resume with the configuration of the run folder"
            )
        loads.append(_state_dict(optimizer, index, names, tensors, saved))
    for optimizer, state_dict in zip(optimizers, loads, strict=True):
        optimizer.load_state_dict(state_dict)


def _state_dict(
    optimizer: torch.optim.Optimizer,
    index: int,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """The argument of `optimizer.load_state_dict`: parameters in this optimiser's own order."""
    numbers = {name: number for number, name in enumerate(_by_name(optimizer, names))}
    states: dict[int, dict[str, Any]] = {}
    for name, scalars in saved["scalars"].items():
        states.setdefault(numbers[name], {}).update(scalars)
    for key, tensor in tensors.items():
        owner, rest = key.split("/", 1)
        if int(owner) == index:
            name, field = rest.rsplit("/", 1)
            # load_state_dict keeps what it is given, and the optimiser then updates it in place
            states.setdefault(numbers[name], {})[field] = tensor.clone()
    groups = []
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        restored = {
            key: tuple(value) if isinstance(group.get(key), tuple) else value
            for key, value in options.items()
        }
        groups.append({**restored, "params": [numbers[names[p]] for p in group["params"]]})
    return {"state": states, "param_groups": groups}


def rng_state(
    generators: Mapping[str, random.Random],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the named generators and of the global ones of python, numpy and torch.

    Returns:
        torch's states as uint8 tensors (`cpu`, and `cuda.N` per device), the others as JSON.
    """
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"cuda.{index}": state for index, state in enumerate(states)}
    # libraries still draw from numpy's global generator, so its state belongs to the run
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return tensors, {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "named": {name: generator.getstate() for name, generator in generators.items()},
    }


def restore_rng_state(
    generators: Mapping[str, random.Random],
    *,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """The inverse of `rng_state`. Another number of CUDA devices than saved is a warning.

    Raises:
        CheckpointError: the named generators are not the saved ones; none was changed.
    """
    if set(generators) != set(state["named"]):
        raise CheckpointError(
            f"the checkpoint holds random generators {sorted(state['named'])}, this run has "
            f"{sorted(generators)}; it was saved by another kind of run"
        )
    for name, generator in generators.items():
        generator.setstate(_python_state(state["named"][name]))
    random.setstate(_python_state(state["python"]))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(tensors["cpu"])
    devices = torch.cuda.device_count()
    saved = [key for key in tensors if key.startswith("cuda.")]
    if len(saved) != devices:
        logger.warning(
            "saved with %d CUDA devices, resumed with %d: random numbers on them will differ",
            len(saved),
            devices,
        )
    for index in range(min(len(saved), devices)):
        torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _python_state(saved: Sequence[Any]) -> tuple[Any, ...]:
    version, words, gauss = saved
    return version, tuple(words), gauss
