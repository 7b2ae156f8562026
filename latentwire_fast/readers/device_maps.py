"""On which devices a reader's weights are: the options of `from_pretrained`, and idle GPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch

from latentwire_fast.errors import ConfigError

logger = logging.getLogger(__name__)


def placement(device_map: Any, max_memory: str | None) -> dict[str, Any]:
    """`device_map` and `max_memory` for `from_pretrained`; nothing where there is no device map.

    Args:
        max_memory: as in `ReaderConfig`.

    Raises:
        ConfigError: memory without a map, or that is no memory; several processes, which would each
            spread the reader over all GPUs.
    """
    if device_map is None:
        if max_memory is not None:
            raise ConfigError(
                f"max_memory={max_memory!r} needs a device map that keeps to it: add "
                "device_map=auto"
            )
        return {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"device_map={device_map!r}: each of several processes takes one GPU; start one "
            "process, or leave the device map away"
        )
    if max_memory is None:
        return {"device_map": device_map}
    return {"device_map": device_map, "max_memory": _memory(max_memory)}


def _memory(text: str) -> dict[int | str, int]:
    """Bytes by device: of all that there are, or of those that are named."""
    if "=" not in text:
        from accelerate.utils import get_max_memory

        size = _bytes(text, text)
        return {d: min(size, n) if isinstance(d, int) else n for d, n in get_max_memory().items()}
    memory: dict[int | str, int] = {}
    for part in text.split(","):
        device, _, size_text = part.strip().partition("=")
        memory[int(device) if device.isdecimal() else device] = _bytes(size_text, text)
    unknown = [d for d in memory if isinstance(d, str) and d not in ("cpu", "disk", "mps")]
    if unknown:
        raise ConfigError(f"max_memory={text!r}: no device {unknown[0]!r}; write 0, 1, ... or cpu")
    return memory


def _bytes(size: str, text: str) -> int:
    # Here, because a GPU machine without accelerate reads too, where no map asks for it.
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(size.strip()))
    except ValueError:
        raise ConfigError(
            f"max_memory={text!r}: {size!r} is no size; write 20GiB (of each GPU), or "
            "0=20GiB,1=40GiB,cpu=60GiB"
        ) from None


def warn_of_idle_cards(devices: Iterable[torch.device], *, cards: int) -> None:
    """Say once which GPUs hold no reader, where one process has several.

    Args:
        devices: of the readers' weights.
        cards: how many GPUs this process sees.
    """
    if cards < 2 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    used = {device.index or 0 for device in devices if device.type == "cuda"}
    idle = [str(card) for card in range(cards) if card not in used]
    if used and idle:
        logger.warning(
            "no reader is on GPU %s of %d: device_map=auto (--reader-options) spreads a reader "
            "over all, `torchrun` starts one process for each, and CUDA_VISIBLE_DEVICES hides some",
            ", ".join(idle),
            cards,
        )
