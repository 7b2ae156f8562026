"""The rates of dropout of what is trained, which a stage may schedule."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from latentwire_fast.models.interlingua import Interlingua


class DropoutRates:
    """Every rate of dropout in a model's encoder and attachments. Pretrained LMs, frozen modules
    and low-rank updates keep their own."""

    def __init__(self, model: Interlingua) -> None:
        parts = [*_trained(model.encoder), *model.attachments.modules()]
        self._layers = [(m, m.p) for m in parts if isinstance(m, nn.Dropout)]
        self._attentions = [(m, m.dropout) for m in parts if isinstance(m, nn.MultiheadAttention)]

    def set(self, rate: float | None) -> None:
        """From now on, drop this share everywhere; None: what each part's settings say."""
        for layer, own in self._layers:
            layer.p = own if rate is None else rate
        for attention, own in self._attentions:
            attention.dropout = own if rate is None else rate


def _trained(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all within it but pretrained LMs and what is frozen."""
    yield module
    pretrained = getattr(module, "pretrained_modules", ())
    for name, child in module.named_children():
        weights = list(child.parameters())
        if name not in pretrained and (not weights or any(w.requires_grad for w in weights)):
            yield from _trained(child)
