"""Work of one stream that another one goes on with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Finished:
    """Where some work ended: the current stream of each device that it was done on.

    On a CPU there is nothing to wait for.

    Args:
        tensors: what the work made.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        self._ends = {
            device: (stream := torch.accelerator.current_stream(device), stream.record_event())
            for device in devices
        }

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Make the streams that are current now wait for the end, and keep the memory of `tensors`
        from being used again before these streams are done with it."""
        others = {}
        for device, (stream, event) in self._ends.items():
            current = torch.accelerator.current_stream(device)
            if current != stream:
                current.wait_event(event)
                others[device] = current
        for tensor in tensors if others else ():
            if tensor.device in others:
                tensor.record_stream(others[tensor.device])
