"""Floating-point operations of a piece of work, counted while it runs.

The formulas are those of torch's own counter, which knows matrix products and attention. For
attention on the CPU and for this package's own ops they are below. Attention counts whole: what a
causal mask leaves out is counted too, as torch does for every attention kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def count_flops(work: Callable[[], object]) -> int:
    """Run `work` and count its operations: a product and a sum are two."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one op for a whole layer, with no formula
    try:
        with _Counter() as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.flops


class _Counter(TorchDispatchMode):
    """Adds up the operations of every op inside it.

    Not torch's `FlopCounterMode`: that follows modules too, and fails on parameters that are read
    without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._formulas = _formulas()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # an op that is made of others counts as these
                parts = func.decompose(*args, **options)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **options)
        if formula is not None:
            self.flops += int(formula(*args, **options, out_val=result))
        return result


def _formulas() -> dict[Any, Callable[..., int]]:
    ours = {
        "linear_losses": _linear_losses,
        "project_calibrate": _project,
        "dequantize_project_calibrate": _project_codes,
    }
    aten, own = torch.ops.aten, torch.ops.latentwire_fast
    # An op that is not there is one that nothing has registered yet, so nothing calls it.
    known = {getattr(own, name, None): formula for name, formula in ours.items()}
    known[getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)] = _attention
    return {**flop_registry, **{op: formula for op, formula in known.items() if op is not None}}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _linear_losses(hidden: Any, *rest: Any, **_: Any) -> int:
    weight = rest[4]
    return 2 * hidden.numel() * len(weight)


def _project(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * len(weight)


def _project_codes(_codes: Any, _scales: Any, *rest: Any, **_: Any) -> int:
    _bits, _group_size, shape, _dtype, weight = rest[:5]
    return 2 * math.prod(shape) * len(weight)
