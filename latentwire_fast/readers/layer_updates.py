"""Changing a frozen reader's hidden states between its layers, for single calls.

    with updated_layers(reader.model, {7: update}):      # behind layer 7, counted from 0
        reader.backbone(input_ids=ids)

An update takes hidden states and gives others of the same shape, dtype and device. Gradients flow
through it. It is a forward hook of the layer: `torch.utils.checkpoint` inside of the layer does not
run it a second time.

Shapes: B rows, T positions, D the reader's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.checks import backbone_of
from latentwire_fast.readers.kv_cache import decoder_layers


@contextmanager
def updated_layers(model: PreTrainedModel, updates: LayerUpdates | None) -> Iterator[None]:
    """Inside the block the hidden states behind these decoder layers are updated, by number from 0.

    Everything that reads with the model meanwhile gets them, from any thread: hold `Reader.lock`
    where there are several. The hooks are gone behind the block, after an error too.
    """
    layers = decoder_layers(model) if updates else ()
    hooks = []
    try:
        for number, update in (updates or {}).items():
            hooks.append(layers[number].register_forward_hook(partial(_updated, update)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _updated(
    update: Callable[[Tensor], Tensor], _layer: nn.Module, _inputs: Any, output: Any
) -> Any:
    """A layer's output with its hidden states updated: they are all of it, or its first part."""
    if isinstance(output, Tensor):
        return update(output)
    return (update(output[0]), *output[1:])


def hidden_sizes(model: PreTrainedModel, ids_1T: Tensor) -> list[float]:
    """Root mean square of the hidden states behind each decoder layer, the median over a prompt's
    positions: the first ones of some models are a thousand times as large as all others."""
    states = _observed(model, ids_1T)
    return [float(x_1TD.float().square().mean(-1).sqrt().median()) for (x_1TD,) in states]


def why_no_updates(model: PreTrainedModel, ids_1T: Tensor, *, width: int) -> str:
    """The reason why hidden states between a reader's layers cannot be updated, tried on a few
    tokens; nothing where they can.

    Args:
        width: D, which they should have.
    """
    try:
        return _fault(model, ids_1T, width)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise of all kinds
        return f"with hooks on its layers it fails ({type(error).__name__}: {error})"


def _fault(model: PreTrainedModel, ids_1T: Tensor, width: int) -> str:
    for number, states in enumerate(_observed(model, ids_1T)):
        if len(states) != 1:
            return f"a forward pass runs layer {number} {len(states)} times where hooks see it"
        if states[0].shape != (*ids_1T.shape, width):
            return (
                f"layer {number} gives {list(states[0].shape)}, and {[*ids_1T.shape, width]} is "
                "expected"
            )
    plain_1TD, changed_1TD = _hidden(model, ids_1T), _hidden(model, ids_1T, {0: torch.zeros_like})
    if torch.equal(plain_1TD, changed_1TD):
        return "what is changed behind its first layer has no effect"
    return ""


def _observed(model: PreTrainedModel, ids_1T: Tensor) -> list[list[Tensor]]:
    """Of each decoder layer, the hidden states of each time that it runs in one pass."""
    seen: list[list[Tensor]] = [[] for _ in decoder_layers(model)]

    def look(states: list[Tensor], hidden_1TD: Tensor) -> Tensor:
        states.append(hidden_1TD.clone())  # the next layer may write to it
        return hidden_1TD

    _hidden(model, ids_1T, {number: partial(look, states) for number, states in enumerate(seen)})
    return seen


@torch.no_grad()
def _hidden(model: PreTrainedModel, ids_1T: Tensor, updates: LayerUpdates | None = None) -> Tensor:
    """Last hidden states `[1, T, D]`."""
    with updated_layers(model, updates):
        output = backbone_of(model)(input_ids=ids_1T, use_cache=False)
    hidden_1TD: Tensor = output.last_hidden_state
    return hidden_1TD
