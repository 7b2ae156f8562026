"""Learns the autoregressive prior: a small recurrent network, trained in floats, kept as integers.

Shapes as in `wire/recurrent_prior.py`: `R` messages, `N` symbols, `T` pieces, `P` pieces of a row,
`c` columns, `K` values, `e` features, `F` = c * e, `H` and `W` widths.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor, nn

from latentwire_fast.wire.range_coder import TOTAL
from latentwire_fast.wire.recurrent_prior import FRACTION_BITS, WEIGHT_BITS, Layout

logger = logging.getLogger(__name__)

_ROUNDS, _RATE = 5, 0.01  # looks at the held-out messages, learning rate
_SYMBOLS = 64 * 192  # of a step, about
_HELD = 10  # every tenth message is held out, to see which weights are best
_FRACTIONS = ("base_TcK", "values_PcKe", "shift_TH", "bias_TcW")  # the others are weights
_LIMIT = (1 << 15) - 1  # of int16


class PriorNetwork(nn.Module):
    """The network in floats; `wire.recurrent_prior.RecurrentPrior` is the same in integers."""

    def __init__(self, layout: Layout, frequencies_NK: np.ndarray, *, seed: int = 0) -> None:
        super().__init__()
        self.layout = layout
        generator = torch.Generator().manual_seed(seed)
        scales = {"carry_HH": 0.0, "inputs_PHF": 0.2, "read_PcWH": 0.1, "own_PcWF": 0.2}
        scales["values_PcKe"] = 0.5
        self.weights = nn.ParameterDict()
        for name, shape in layout.shapes.items():
            start = torch.randn(shape, generator=generator) * scales.get(name, 0.0)
            self.weights[name] = nn.Parameter(start, requires_grad=name != "base_TcK")
        with torch.no_grad():
            self.weights["carry_HH"].add_(0.5 * torch.eye(layout.width))
            self.weights["base_TcK"].copy_(self._pieces(torch.from_numpy(frequencies_NK)).log2())
            if layout.features == 1:  # the values have an order
                sizes = torch.from_numpy(layout.sizes_Pc)[..., None, None].clamp(min=2)
                steps = torch.arange(max(layout.sizes_C))[:, None]
                self.weights["values_PcKe"].copy_((4 * steps / (sizes - 1) - 2).clamp(max=2))
        visible = torch.from_numpy(layout.visible_cF())[:, None].float()
        self.register_buffer("visible_c1F", visible)
        sizes_Pc = torch.from_numpy(layout.sizes_Pc)
        is_value = torch.arange(max(layout.sizes_C)) < sizes_Pc[..., None]
        self.register_buffer("is_value_PcK", is_value)
        self.visible_c1F: Tensor
        self.is_value_PcK: Tensor

    def _pieces(self, of_symbols: Tensor) -> Tensor:
        """What there is of each symbol `[..., N, x]`, by piece `[..., T, c, x]`."""
        layout, in_row = self.layout, len(self.layout.sizes_C)
        rows = of_symbols.unflatten(-2, (-1, in_row))
        missing = layout.pieces * layout.columns - in_row
        padding = torch.ones_like(rows[..., :1, :]).repeat_interleave(missing, -2)
        padded = torch.cat([rows, padding], -2)
        return padded.unflatten(-2, (layout.pieces, layout.columns)).flatten(-4, -3)

    def bits(self, symbols_RN: Tensor) -> Tensor:
        """The bits of each message `[R]`, with a gradient to the weights."""
        w, pieces = self.weights, self.layout.pieces
        in_row = len(self.layout.sizes_C)
        symbols_RTc = self._pieces(symbols_RN[..., None])[..., 0]
        total_R = symbols_RN.new_zeros(len(symbols_RN), dtype=torch.float32)
        state_RH = total_R.new_zeros(len(symbols_RN), self.layout.width)
        for t in range(symbols_RTc.shape[1]):
            p = t % pieces
            count = min(self.layout.columns, in_row - p * self.layout.columns)
            x_RF = self._features(symbols_RTc[:, t], p, count)
            own = (w["own_PcWF"][p] * self.visible_c1F).flatten(0, 1)
            sum_Rx = state_RH @ w["read_PcWH"][p].flatten(0, 1).T + x_RF @ own.T
            sum_RcW = sum_Rx.unflatten(1, w["bias_TcW"][t].shape) + w["bias_TcW"][t]
            logits_cRK = sum_RcW.relu().transpose(0, 1) @ w["out_PcKW"][p].transpose(1, 2)
            logits_cRK = logits_cRK + w["base_TcK"][t][:, None]
            logits_cRK = logits_cRK.masked_fill(~self.is_value_PcK[p][:, None], -1e4)[:count]
            nats_cRK = (logits_cRK * math.log(2)).log_softmax(-1)
            chosen = symbols_RTc[:, t, :count].T[..., None]
            total_R = total_R - nats_cRK.gather(-1, chosen).sum((0, 2)) / math.log(2)
            sum_RH = state_RH @ w["carry_HH"].T + x_RF @ w["inputs_PHF"][p].T
            state_RH = (sum_RH + w["shift_TH"][t]).relu()
        return total_R

    def _features(self, symbols_Rc: Tensor, p: int, count: int) -> Tensor:
        """The features `[R, F]` of a piece; 0 where it has no such column."""
        values_cKe = self.weights["values_PcKe"][p]
        columns = torch.arange(count, device=symbols_Rc.device)
        x_Rce = values_cKe[columns, symbols_Rc[:, :count]]
        missing = self.layout.columns - count
        return nn.functional.pad(x_Rce, (0, 0, 0, missing)).flatten(1)

    def integers(self) -> dict[str, Tensor]:
        """The weights as the wire has them: int16, on the CPU."""
        found = {}
        for name, weight in self.weights.items():
            unit = 1 << (FRACTION_BITS if name in _FRACTIONS else WEIGHT_BITS)
            rounded = (weight.detach().cpu().double() * unit).round()
            found[name] = rounded.clamp(-_LIMIT, _LIMIT).to(torch.int16)
        return found


def learned_prior(
    layout: Layout, symbols_RN: Tensor, frequencies_NK: np.ndarray, *, steps: int
) -> dict[str, Tensor]:
    """The integers of a network that has learned from messages, which starts at the static prior.

    Of the weights that training comes by, those are kept under which held-out messages are the
    shortest: few messages make no prior worse than the static one.

    Args:
        symbols_RN: the messages' symbols of the rows.
        frequencies_NK: how often each value comes by itself, of 65536; 1 behind the last value.
        steps: of the training.
    """
    with torch.enable_grad():
        return _trained(PriorNetwork(layout, frequencies_NK / TOTAL), symbols_RN, steps)


def _trained(network: PriorNetwork, symbols_RN: Tensor, steps: int) -> dict[str, Tensor]:
    device = symbols_RN.device
    network.to(device)
    is_held = torch.arange(len(symbols_RN), device=device) % _HELD == _HELD - 1
    held, seen = symbols_RN[is_held], symbols_RN[~is_held]
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    batch = min(max(8, _SYMBOLS // symbols_RN.shape[1]), len(seen))
    best, first = network.integers(), _mean_bits(network, held)
    least = first
    for step in range(1, steps + 1):
        chosen = torch.randint(len(seen), (batch,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        network.bits(seen[chosen.to(device)]).mean().backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // _ROUNDS) == 0 and (bits := _mean_bits(network, held)) < least:
            best, least = network.integers(), bits
    logger.info("prior: %.1f bits of a held-out text's rows, static %.1f", least, first)
    return best


@torch.no_grad()
def _mean_bits(network: PriorNetwork, symbols_RN: Tensor) -> float:
    if not len(symbols_RN):
        return math.inf
    return float(torch.cat([network.bits(piece) for piece in symbols_RN.split(256)]).mean())
