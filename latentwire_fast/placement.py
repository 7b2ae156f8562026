"""Where a reader's layers live, and moving a K/V prefix there: the Python face of `csrc/`.

The compiled extension `latentwire_fast._C` does the work when it was built; the torch path beside
it has the same meaning, and the tests hold the two to the same results.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from latentwire_fast.errors import ConfigError

logger = logging.getLogger(__name__)

try:
    from latentwire_fast import _C
except ImportError as _error:
    _C = None
    logger.warning(
        "the C++ extension is not built (%s): placement uses its slower torch path, with the same "
        "results; build it with `pip install --no-build-isolation -e .`",
        _error,
    )


class DeviceRuns(NamedTuple):
    """The layers of one device, as runs `(first, count)` of adjacent layers in ascending order."""

    device: str
    runs: list[tuple[int, int]]


def has_extension() -> bool:
    """Whether the compiled extension was built and loads."""
    return _C is not None


def plan(layer_devices: Sequence[str]) -> list[DeviceRuns]:
    """Group a layer -> device map by device, devices in the order of their first layer.

    Args:
        layer_devices: one device name per layer, such as `["cuda:0", "cuda:0", "cpu"]`.

    Raises:
        ConfigError: an empty map, a name that is no device, or `disk` or `meta`, which hold no
            memory that a prefix could be copied to.
    """
    if _C is None:
        return _plan_in_torch(layer_devices)
    try:
        return [DeviceRuns(device, runs) for device, runs in _C.plan(list(layer_devices))]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _plan_in_torch(layer_devices: Sequence[str]) -> list[DeviceRuns]:
    if not layer_devices:
        raise ConfigError("the device map names no layer")
    grouped: dict[str, list[tuple[int, int]]] = {}
    for layer, name in enumerate(layer_devices):
        runs = grouped.setdefault(_device_name(name, layer=layer), [])
        if runs and sum(runs[-1]) == layer:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return [DeviceRuns(device, runs) for device, runs in grouped.items()]


def _device_name(name: str, *, layer: int) -> str:
    if name in ("disk", "meta"):
        raise ConfigError(
            f"layer {layer} is on '{name}', which holds no memory to place a prefix in; "
            "load the reader with that layer on a device"
        )
    try:
        return str(torch.device(name))
    except RuntimeError:
        raise ConfigError(
            f"layer {layer} is on '{name}', which is not a device; "
            "name one such as 'cpu' or 'cuda:0'"
        ) from None
