"""All weights of a model, also those that accelerate keeps elsewhere (on a disk, or in the CPU's
memory) and brings to the device for the time of a module's forward pass; and those in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latentwire_fast.files.tensors import ordered_digest
from latentwire_fast.readers.lora import own_names


def weights_digest(model: nn.Module) -> str:
    """sha256 over the weights as they are now, wherever they are: offloaded ones are read one
    module at a time. Of 4-bit weights the scales are taken in too."""
    return ordered_digest(_weights(model))


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are not in the memory of the device that computes with them."""
    return any(weight.is_meta for weight in model.parameters())


def keep_ends_in_memory(model: PreTrainedModel) -> None:
    """Bring the input and output embeddings back, where accelerate has offloaded them: their
    weights are read without a forward pass, by losses and by adapters."""
    first: Any = model.get_input_embeddings()
    last: Any = model.get_output_embeddings()
    if last is None:  # no reader, which is found out where readers are made
        return
    tied = first.weight is last.weight
    for module in (first, last):
        if module.weight.is_meta:
            _bring_back(module)
    if tied:
        last.weight = first.weight


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's weights another dtype. What it computes from its configuration stays as it is:
    rotary frequencies in bfloat16 put positions behind the first hundred elsewhere."""
    computed = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, value in computed:
        module._buffers[name] = value


def use_plain_nf4(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in their first forward pass on a CPU that has
    AVX-512 BF16: gradients do not flow through its kernel for them, to no prefix and without a
    word, and the bytes that the weights are known by would depend on the CPU."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, by name; of a weight with two names the first. Low-rank updates of a
    reader are none of them."""
    names = own_names(model)
    for name in sorted(names):
        owner, _, own_name = names[name].rpartition(".")
        module = model.get_submodule(owner)
        with _here(module):
            weight = getattr(module, own_name)
            yield name, weight.detach()
        state: Any = getattr(weight, "quant_state", None)  # of bitsandbytes: scales, one per block
        if state is not None:
            for part, value in sorted(state.as_dict(packed=True).items()):
                yield f"{name}.{part}", value


def _here(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block a module's weights are in memory. A machine without accelerate, which
    nothing was offloaded on, can read a reader too."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    found: AbstractContextManager[None] = align_module_device(module)
    return found


def _bring_back(module: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    from accelerate.utils import align_module_device

    device = module._hf_hook.execution_device
    with align_module_device(module, execution_device=device):
        weights = {name: w.detach().clone() for name, w in module.named_parameters(recurse=False)}
    remove_hook_from_module(module)
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight.to(device), requires_grad=False))
    hook = AlignDevicesHook(execution_device=torch.device(device))  # inputs come to its device
    add_hook_to_module(module, hook)
