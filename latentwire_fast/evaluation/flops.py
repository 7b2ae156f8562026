"""Floating-point operations of a piece of work, counted while it runs.

torch's counter sees matrix products and attention. It does not know attention on the CPU, nor this
package's own ops, so these formulas are given to it. Attention counts whole: half of what a causal
mask leaves out is counted too, as torch does for every attention kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from latentwire_fast import ops

assert ops  # its import registers the ops that are named below


def count_flops(work: Callable[[], object]) -> int:
    """Run `work` and count its operations: a product and a sum are two."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        work()
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for what torch's counter does not know; tensors arrive as shapes."""
    known: dict[Any, Callable[..., int]] = {
        torch.ops.latentwire_fast.linear_losses: _linear_losses,
        torch.ops.latentwire_fast.project_calibrate: _project,
        torch.ops.latentwire_fast.dequantize_project_calibrate: _project_codes,
    }
    on_the_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if on_the_cpu is not None:
        known[on_the_cpu] = _attention
    return known


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _linear_losses(hidden: Any, *rest: Any, **_: Any) -> int:
    weight = rest[4]
    return 2 * math.prod(hidden) * int(weight[0])


def _project(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])


def _project_codes(codes: Any, scales: Any, *rest: Any, **_: Any) -> int:
    _bits, _group_size, shape, _dtype, weight = rest[:5]
    return 2 * math.prod(shape) * int(weight[0])
