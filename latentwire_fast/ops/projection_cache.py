"""The projection's parameters as its kernels take them, kept while they are frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

if TYPE_CHECKING:
    from latentwire_fast.kernels.projection import Folded, Norm

# By weight: the state that was folded, the other parameters, and the result. An entry goes with its
# weight.
_folds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# By the mean squares that a forward pass returned: what it folded. Autograd keeps those as long as
# it may go backward, and refuses to where a parameter was written since.
_steps: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep(mean_square: Tensor, result: Folded | None) -> None:
    """For the backward pass that is given these mean squares."""
    if result is not None:
        _steps[mean_square] = result


def kept(mean_square: Tensor) -> Folded | None:
    """What its forward pass folded; None if that is not known."""
    return _steps.get(mean_square)


def folded(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, norm: Norm, *, dtype: torch.dtype
) -> Folded:
    """`kernels.projection.fold` of these parameters, from memory if they are frozen and unchanged.

    Unchanged: the same tensor objects, in the same memory, at the same versions, on the same
    stream. torch counts every write to a tensor but those through `.data` or a bare pointer.

    Two launches anew each time for parameters that train, for those whose versions torch does not
    count (made under `inference_mode`), and while a CUDA graph is captured: its replays see weights
    that were written since, and its memory is its own.
    """
    from latentwire_fast.kernels import projection as kernels

    turned = kernels.is_turned(weight.shape[1], norm, dtype)
    rest = (bias, gamma, *((norm.weight, norm.bias) if turned else ()))
    tensors = [t for t in (weight, *rest) if t is not None]
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or any(t.requires_grad or t.is_inference() for t in tensors):
        return kernels.fold(weight, bias, gamma, norm, dtype=dtype)
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    state = (dtype, stream, *((t._version, t.data_ptr()) for t in tensors))
    others = [None if t is None else TensorWeakRef(t) for t in rest]
    found = _folds.get(weight)
    if found is not None and found[0] == state and _same(found[1], rest):
        return found[2]
    result = kernels.fold(weight, bias, gamma, norm, dtype=dtype, frozen=True)
    _folds[weight] = (state, others, result)
    return result


def _same(references: list[TensorWeakRef | None], tensors: tuple[Tensor | None, ...]) -> bool:
    found = (None if reference is None else reference() for reference in references)
    return len(references) == len(tensors) and all(
        f is t for f, t in zip(found, tensors, strict=True)
    )
