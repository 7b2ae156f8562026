"""Moving one K/V prefix to the devices that a reader's layers live on.

A prefix is one tensor `[L, 2, B, H, P, D]`. The usual way to hand one over is a loop over layers
that moves, casts and concatenates keys and values one by one: six launches for every layer. Here
the whole prefix is cast once and crosses each link once, on a side stream while the reader
computes. The C++ extension `latentwire_fast._C` (csrc/placement.h) does it; where that was not
built, the torch path at the end of this file gives the same tensors and counts, on the current
streams.

`kv_cache.py` puts what arrives into the caches of transformers.

Shapes: L layers, 2 keys and values, B batch (or 1, broadcast), H key/value heads, P positions,
D head width, N cache length; l layers of one device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from latentwire_fast.errors import ConfigError

logger = logging.getLogger(__name__)

INTERFACE = 2  # of the extension that this file calls

try:
    from latentwire_fast import _C
except ImportError as _error:
    _C = None  # type: ignore[assignment]
    _fault: object = _error
else:
    _fault = None
    if getattr(_C, "INTERFACE", 1) != INTERFACE:
        _C, _fault = None, "it was built from older source"  # type: ignore[assignment]
if _fault is not None:
    logger.warning(
        "the C++ extension is not built (%s): placement uses its torch path, with the same results "
        "and no overlap; build it with `pip install --no-build-isolation -e .`",
        _fault,
    )


class DeviceRuns(NamedTuple):
    """The layers of one device, as runs `(first, count)` of adjacent layers in ascending order."""

    device: str
    runs: list[tuple[int, int]]

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers."""
        return [first + i for first, count in self.runs for i in range(count)]


class Copies(NamedTuple):
    """The number of times that K/V data was copied.

    Attributes:
        prepare: where it was produced: gathered by device, cast, pinned. 1 for all of that; with
            gradients, 2 where an odd map is cast as well.
        link: to another device. 1 for each device that the prefix is not on; where more than 16 MB
            cross on a side stream, 1 for each part of 8 MB or more, 8 at most.
        scatter: into a static cache. 1 for each device.
    """

    prepare: int
    link: int
    scatter: int


def has_extension() -> bool:
    """Whether the C++ extension was built and loads."""
    return _C is not None


@contextmanager
def _config_error() -> Iterator[None]:
    """The extension throws ValueError for what is wrong with its arguments."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def plan(layer_devices: Sequence[str]) -> list[DeviceRuns]:
    """Group a layer -> device map by device, devices in the order of their first layer.

    Args:
        layer_devices: one device name per layer, such as `["cuda:0", "cuda:0", "cpu"]`.

    Raises:
        ConfigError: an empty map; a name that is no device, or an accelerator without its index;
            `disk` or `meta`, which hold no memory that a prefix could be copied to.
    """
    with _config_error():
        groups = _plan_in_torch(layer_devices) if _C is None else _C.plan(list(layer_devices))
    return [DeviceRuns(device, runs) for device, runs in groups]


class Placement:
    """A prefix on its way to its devices, which are numbered as in the plan.

    Attributes:
        keys: by layer, `[B, H, P, D]`: views of one block per device, broadcast over the batch.
        values: likewise.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self.keys, self.values = native.layers()

    def wait(self, device: int) -> None:
        """Make the current stream of a device wait until its part has arrived."""
        self._native.wait(device)

    def wait_for_layer(self, layer: int) -> None:
        """Make the current stream of a layer's device wait until that layer has arrived."""
        self._native.wait_for_layer(layer)

    def is_under_way(self, layer: int) -> bool:
        """Whether a layer comes on a side stream, so that its readers must wait for it."""
        return self._native.is_under_way(layer)

    def scatter(self, device: int, *, target: torch.Tensor) -> None:
        """Write a device's part into positions 0..P-1 of `target` `[l, 2, B, H, N, D]`: one copy.

        Raises:
            ConfigError: a target of another shape, dtype or device, or one shorter than the prefix.
        """
        with _config_error():
            self._native.scatter(device, target)

    @property
    def copies(self) -> Copies:
        """The copies made so far."""
        native = self._native.copies
        return Copies(native.prepare, native.link, native.scatter)


class Placer:
    """Sends prefixes to the devices of one reader.

    Args:
        layer_devices: the device name of each layer.
        dtype: the cache's dtype; the prefix is cast to it before it crosses a link.

    Raises:
        ConfigError: a map that `plan` refuses, a device that this machine lacks, a dtype that is no
            float.
    """

    def __init__(self, layer_devices: Sequence[str], *, dtype: torch.dtype) -> None:
        self.plan = plan(layer_devices)
        make: Any = _TorchPlacer if _C is None else _C.Placer
        with _config_error():
            self._native = make(list(layer_devices), dtype)

    def place(
        self, prefix_L2BHPD: torch.Tensor, *, batch_size: int, stable: bool = False
    ) -> Placement:
        """Send a prefix off.

        Args:
            prefix_L2BHPD: floating-point, on any device. Where it has the cache's dtype and device,
                what is placed are views of it: do not write to it afterwards. Where it is cast on
                the CPU, into memory that an earlier placement had and that nothing refers to now.
            batch_size: B, or any number when B is 1.
            stable: a promise that nothing writes to the prefix again. One that needs no cast then
                crosses links from where it is, and is read after this call has returned. Without
                the promise what crosses is a copy.

        With gradients (grad mode, and a prefix that requires them) everything runs on the current
        streams, and gradients flow back. Otherwise what crosses a link comes on a side stream: see
        `Placement.wait`.

        Raises:
            ConfigError: a prefix of another shape or layout, or one that does not fit the plan.
        """
        with _config_error():
            return Placement(self._native.place(prefix_L2BHPD, batch_size, stable))


# --- The torch path: the meaning of csrc/placement.cpp, without streams -------------------------


def _plan_in_torch(layer_devices: Sequence[str]) -> list[tuple[str, list[tuple[int, int]]]]:
    if not layer_devices:
        raise ValueError("the device map names no layer")
    grouped: dict[str, list[tuple[int, int]]] = {}
    for layer, name in enumerate(layer_devices):
        runs = grouped.setdefault(_device_name(name, layer=layer), [])
        if runs and sum(runs[-1]) == layer:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return list(grouped.items())


def _device_name(name: str, *, layer: int) -> str:
    if name in ("disk", "meta"):
        raise ValueError(
            f"layer {layer} is on '{name}', which holds no memory to place a prefix in; load the "
            "reader with that layer on a device"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"layer {layer} is on '{name}', which is not a device; name one such as 'cpu' or "
            "'cuda:0'"
        ) from None
    if device.type == "cpu":
        return "cpu"
    if device.index is None:
        raise ValueError(
            f"layer {layer} is on '{name}', which may be any of several; say which, as in "
            f"'{name}:0'"
        )
    return str(device)


def _in_training(prefix: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and prefix.requires_grad


def _is_present(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return device.type == "cpu"
    return device.index < torch.accelerator.device_count()


class _TorchPlacement:
    def __init__(
        self, slabs: list[torch.Tensor], *, order: list[list[int]], batch_size: int, copies: Copies
    ) -> None:
        self.slabs, self.order, self.batch_size, self.copies = slabs, order, batch_size, copies

    def layers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        by_layer: dict[int, tuple[torch.Tensor, ...]] = {}
        for slab, numbers in zip(self.slabs, self.order, strict=True):
            shape = (*slab.shape[:2], self.batch_size, *slab.shape[3:])
            views = slab.expand(shape).flatten(0, 1).unbind(0)
            by_layer |= zip(numbers, zip(views[::2], views[1::2], strict=True), strict=True)
        keys, values = zip(*(by_layer[number] for number in sorted(by_layer)), strict=True)
        return list(keys), list(values)

    def scatter(self, device: int, target: torch.Tensor) -> None:
        slab = self.slabs[device]
        shape = (*slab.shape[:2], self.batch_size, *slab.shape[3:])
        length = target.shape[4] if target.dim() == 6 else 0
        if length < shape[4]:
            raise ValueError(
                f"the cache holds {length} positions and the prefix {shape[4]}; make the cache "
                "longer"
            )
        part = target.narrow(4, 0, shape[4])
        if (part.shape, part.dtype, part.device) != (shape, slab.dtype, slab.device):
            raise ValueError(
                f"the cache is {list(target.shape)} of {target.dtype} on {target.device} and the "
                f"prefix {list(shape)} of {slab.dtype} on {slab.device}"
            )
        part.copy_(slab)
        self.copies = self.copies._replace(scatter=self.copies.scatter + 1)

    def wait(self, device: int) -> None:
        """Nothing to wait for: the copies were made on the current streams."""

    def wait_for_layer(self, layer: int) -> None:
        """Likewise."""

    def is_under_way(self, layer: int) -> bool:
        return False


class _TorchPlacer:
    def __init__(self, layer_devices: list[str], dtype: torch.dtype) -> None:
        self.devices = [(torch.device(name), runs) for name, runs in _plan_in_torch(layer_devices)]
        self.layers, self.dtype = len(layer_devices), dtype
        if not dtype.is_floating_point:
            raise ValueError(f"the cache's dtype is {dtype}, not a float")
        for device, runs in self.devices:
            if not _is_present(device):
                raise ValueError(
                    f"layer {runs[0][0]} is on '{device}', which is not on this machine, or not in "
                    "this build of torch"
                )

    def place(self, prefix: torch.Tensor, batch_size: int, stable: bool) -> _TorchPlacement:
        """`stable` changes nothing: copies from the host have ended when this returns."""
        self.check(prefix, batch_size)
        if prefix.stride(2) == 0 and not _in_training(prefix):
            prefix = prefix.narrow(2, 0, 1)  # one row, which the caller broadcast already
        order = [DeviceRuns(str(device), runs).layers for device, runs in self.devices]
        source, prepare = self.prepare(prefix)
        link = 0
        slabs = []
        parts = source.split([len(numbers) for numbers in order])
        for (device, _), part in zip(self.devices, parts, strict=True):
            link += device != source.device
            slabs.append(part.to(device))
        copies = Copies(prepare, link, 0)
        return _TorchPlacement(slabs, order=order, batch_size=batch_size, copies=copies)

    def prepare(self, prefix: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The prefix gathered and cast, and the copies that this took."""
        runs = [run for _, runs in self.devices for run in runs]
        is_odd = len(runs) > len(self.devices)
        parts = [prefix.narrow(0, first, count) for first, count in runs]
        if _in_training(prefix):
            source = torch.cat(parts) if is_odd else prefix
            if source.dtype == self.dtype and (is_odd or self.fits(source)):
                return source, int(is_odd)
            layout = torch.contiguous_format
            return source.to(self.dtype, copy=True, memory_format=layout), int(is_odd) + 1
        if prefix.dtype == self.dtype and not is_odd and self.fits(prefix):
            return prefix, 0
        source = torch.empty_like(prefix, dtype=self.dtype)  # laid out as the prefix
        if not self.fits(source):
            source = prefix.new_empty(prefix.shape, dtype=self.dtype)
        return (torch.cat(parts, out=source) if is_odd else source.copy_(prefix)), 1

    def fits(self, prefix: torch.Tensor) -> bool:
        """What stays is seen through views, to which layers, keys and values are one dimension;
        what crosses a link is one block."""
        if any(device != prefix.device for device, _ in self.devices):
            return prefix.is_contiguous()
        return prefix.stride(0) == 2 * prefix.stride(1)

    def check(self, prefix: torch.Tensor, batch_size: int) -> None:
        shape = list(prefix.shape)
        if len(shape) != 6 or shape[1] != 2 or not prefix.numel():
            raise ValueError(
                "a prefix is [layers, 2, batch or 1, heads, positions, head width], none of them "
                f"0; this one is {shape}"
            )
        if shape[0] != self.layers:
            raise ValueError(f"the prefix has {shape[0]} layers and the reader {self.layers}")
        if batch_size < 1:
            raise ValueError(f"the batch is {batch_size}, and must be at least 1")
        if shape[2] not in (1, batch_size):
            raise ValueError(
                f"the prefix is for a batch of {shape[2]} and the cache for one of {batch_size}; "
                "only a batch of 1 is broadcast"
            )
        if not prefix.is_floating_point() or prefix.layout != torch.strided or prefix.is_meta:
            raise ValueError(
                f"a prefix is a dense tensor of floats with memory; this one is {prefix.type()}"
            )
