"""The projection's gradients, from x and r2 alone (`projection` has the names).

Folded: with U = dout (gamma * P) `[N, K]` one matmul gives the pieces of <dout, gamma * y> as
<U, [x, 1]>, and

    w = <dout, gamma*y> / (count * (r2 + eps))    both summed over the count values that share r2
    dx = s (U - w G [x, 1])                        the second term is what calibration takes away
    A = dout' [s x, s, 1],  C = sum of w [x, 1] [s x, s]'
    d(W | b) = gamma * A - P C,   dgamma = rowsum(A * P),   dbeta = A's column of ones
    dgain = sum of <dout, gamma*y> s / gain

Two matmuls of N*D*K and two reads of dout in all; y's gradient is never written.

Turned (`projection`), z stands for [x, 1] in all of this, and the parameters' kernel goes back from
P: with Q = d(W_n H | b_n) and T the sum of a row of Q but for its last value,

    dW_n = Q - T / (sqrt(d) (sqrt(d) - 1)), its last column T / sqrt(d);   db_n = Q's last column
    dW = dW_n diag(norm weight) + db_n norm_bias',   db = db_n
    d(norm weight) = colsum(dW_n * W),   d(norm bias) = W' db_n

Else the norm's gradients are sums over the rows. All sums are of two stages and in a fixed order.

Tiles: y's gradient dy `[N, D]` is made as `projection_tiles` says; two matmuls give those of x, W.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from latentwire_fast.kernels.matmul import add_matmul_fp32, matmul_fp32
from latentwire_fast.kernels.projection import Folded, Projection
from latentwire_fast.kernels.projection_gradients import (
    BOTH,
    DOTS,
    PARAMETER_ROWS,
    SUM_COLUMNS,
    SUM_PARTS,
    WRITE,
    _gradient_rows_kernel,
    _norm_gradient_kernel,
    _parameters_kernel,
    _sums_kernel,
)
from latentwire_fast.kernels.projection_pieces import TILE_VALUES, plain_tiling
from latentwire_fast.kernels.projection_rows import normalised_rows
from latentwire_fast.kernels.projection_tiles import Tiles

# Gradients, in the order in which they are asked for and returned.
X, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, GAMMA, BETA, GAIN = range(8)
# The columns that the scaled rows have more if their last is not free for the 1 that dbeta needs.
ONES = 8


def _unit_scale(p: Projection, squares: Tensor) -> Tensor | float:
    """s without the gain, per group of rows."""
    c = p.calibration
    return c.target_rms * (squares + c.eps).rsqrt() if c.group_rows else c.target_rms


def _sums(parts: Tensor, p: Projection, needs: list[bool], found: list[Tensor | None]) -> None:
    """The norm's gradients from the programs' `[programs, 2, d]`."""
    _, _, width = parts.shape
    weight, bias = p.norm.weight, p.norm.bias
    assert weight is not None
    found[NORM_WEIGHT] = parts.new_empty(width, dtype=weight.dtype)
    if bias is not None and needs[NORM_BIAS]:
        found[NORM_BIAS] = parts.new_empty(width, dtype=bias.dtype)
    second = found[NORM_BIAS]
    planes = 1 if second is None else 2
    _sums_kernel[(planes * triton.cdiv(width, SUM_COLUMNS),)](
        *(parts, found[NORM_WEIGHT], parts if second is None else second, parts.shape[0]),
        HAS_SECOND=second is not None,
        WIDTH=width,
        STEPS=triton.next_power_of_2(triton.cdiv(parts.shape[0], SUM_PARTS)),
        TILE_PARTS=SUM_PARTS,
        TILE=SUM_COLUMNS,
        num_warps=4,
    )


def _norm_gradients(
    found: list[Tensor | None], needs: list[bool], along: Tensor, x: Tensor, p: Projection,
    squares: Tensor | None = None, *, turned: bool = False,
) -> None:  # fmt: skip
    """From the gradient of the normalised rows to those of x and of LayerNorm's parameters.

    Args:
        along: fp32, d columns or more; squares: it is to be multiplied by their s.
    """
    (rows, width), c, norm = x.shape, p.calibration, p.norm.weight
    tile_rows, block = plain_tiling(width)
    programs = triton.cdiv(rows, tile_rows)
    sums = norm is not None and not turned and (needs[NORM_WEIGHT] or needs[NORM_BIAS])
    dx = x.new_empty((rows, width), dtype=x.dtype)
    parts = x.new_empty((programs, 2, width) if sums else 0, dtype=torch.float32)
    scaled = squares is not None
    _norm_gradient_kernel[(programs,)](
        *(x, along, *(x if t is None else t for t in (norm, c.gain, squares)), dx, parts),
        *(rows, max(c.group_rows, 1), c.target_rms, c.eps, p.norm.eps),
        WIDTH=width,
        STRIDE=along.stride(0),
        SCALED=scaled,
        CALIBRATED=c.group_rows > 0,
        HAS_GAIN=scaled and c.gain is not None,
        HAS_NORM=norm is not None,
        TURNED=turned,
        SUMS=sums,
        BLOCK=block,
        TILE_ROWS=tile_rows,
        num_warps=4,
    )
    found[X] = dx
    if sums:
        _sums(parts, p, needs, found)


def _wide_norm_gradients(
    found: list[Tensor | None], d_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    p: Projection,
) -> None:  # fmt: skip
    """Torch's, of rows that no program holds whole."""
    found[X] = d_normed
    if p.norm.weight is not None:
        found[X], found[NORM_WEIGHT], found[NORM_BIAS] = torch.ops.aten.native_layer_norm_backward(
            *(d_normed.contiguous(), x.float(), [x.shape[1]], mean[:, None], rstd[:, None]),
            *(p.norm.weight.float(), p.norm.weight.float(), [True, True, True]),
        )


class _Rows:
    """The launches of `_gradient_rows_kernel` for one call."""

    def __init__(
        self, x: Tensor, p: Projection, folded: Folded, squares: Tensor, *, ones: bool
    ) -> None:
        self.x, self.p, self.folded, self.squares = x, p, folded, squares
        self.padded = folded.gram.shape[0]
        self.outer = self.padded + (ONES if folded.turned and ones else 0)

    def _run(self, mode: int, tensors: tuple[Tensor | None, ...]) -> None:
        """Of a tensor that is absent, x is passed, and not touched."""
        x, p, c = self.x, self.p, self.p.calibration
        tile_rows, block = plain_tiling(x.shape[1])
        _gradient_rows_kernel[(triton.cdiv(x.shape[0], tile_rows),)](
            x, *(x if t is None else t for t in (p.norm.weight, p.norm.bias, c.gain, *tensors)),
            *(x.shape[0], max(c.group_rows, 1), c.target_rms, c.eps, p.norm.eps),
            MODE=mode,
            WIDTH=x.shape[1],
            PADDED=self.padded,
            OUTER=self.outer,
            OUTPUTS=p.weight.shape[0],
            CALIBRATED=c.group_rows > 0,
            HAS_NORM=p.norm.weight is not None,
            HAS_NORM_BIAS=p.norm.bias is not None,
            HAS_GAIN=c.gain is not None,
            TURNED=self.folded.turned,
            BLOCK=block,
            TILE_ROWS=tile_rows,
            num_warps=4,
        )  # fmt: skip

    def write(self, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[s x, s, 1]`; `w [x, 1]`; <dout, gamma*y> per group of rows (per row without any).

        No bound keeps w in fp16's range: it is fp32 then.
        """
        x, rows, group_rows = self.x, len(self.x), max(self.p.calibration.group_rows, 1)
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        dots = x.new_empty(rows, dtype=torch.float32)
        scaled = x.new_empty((rows, self.outer), dtype=x.dtype)
        weighted = x.new_empty((rows, self.padded), dtype=wide)
        if group_rows == 1:
            self._run(BOTH, (along, self.squares, dots, scaled, weighted))
            return scaled, weighted, dots
        self._run(DOTS, (along, None, dots, None, None))
        dots = dots.view(-1, group_rows).sum(1)
        self._run(WRITE, (None, self.squares, dots, scaled, weighted))
        return scaled, weighted, dots


def _rounded_gram(folded: Folded, dtype: torch.dtype) -> Tensor:
    """G, for w G z. Of turned rows without a part of its diagonal, g I: LayerNorm's backward takes
    away all that lies along its output, g w z too, and rounding G's diagonal, the largest of it,
    would leave most of the error (bf16, d = 48, D = 4096: dx is off by 0.024 with it and by 0.005
    without, eager torch's by 0.016)."""
    gram = folded.gram.to(dtype)
    if folded.turned:
        diagonal = folded.gram.diagonal()[:-1]
        gram = gram.clone() if gram is folded.gram else gram
        gram.diagonal()[:-1] = diagonal - diagonal[0]
    return gram


def _taken(folded: Folded, weighted: Tensor, scaled: Tensor) -> Tensor:
    """P C `[D, K]` in fp32; bf16 holds any C, fp16 does not."""
    rows = scaled[:, : folded.gram.shape[0]].to(weighted.dtype)
    sums = matmul_fp32(weighted.T, rows)
    plain = folded.plain
    if plain.dtype == torch.bfloat16 == weighted.dtype:
        return matmul_fp32(plain, sums.to(plain.dtype))
    return matmul_fp32(plain.float(), sums)


def _parameter_gradients(
    found: list[Tensor | None], needs: list[bool], outer: Tensor, taken: Tensor | None,
    p: Projection, folded: Folded,
) -> None:  # fmt: skip
    """From dout' [s x, s, 1] `[D, K or more]` and what calibration takes away."""
    outputs, width = p.weight.shape
    programs = triton.cdiv(outputs, PARAMETER_ROWS)
    parts = outer.new_empty((programs, 2, width) if folded.turned else 0, dtype=torch.float32)
    found[WEIGHT] = outer.new_empty((outputs, width), dtype=p.weight.dtype)
    for place, tensor in ((BIAS, p.bias), (GAMMA, p.gamma)):
        if tensor is not None:
            found[place] = outer.new_empty(outputs, dtype=tensor.dtype)
    if needs[BETA]:
        found[BETA] = outer.new_empty(outputs, dtype=torch.float32)
    given = (taken, folded.plain, p.weight, p.gamma, p.norm.weight, p.norm.bias)
    made = (found[place] for place in (WEIGHT, BIAS, GAMMA, BETA))
    _parameters_kernel[(programs,)](
        *(outer, *(outer if t is None else t for t in (*given, *made)), parts, outputs),
        WIDTH=width,
        PADDED=folded.gram.shape[0],
        OUTER=outer.shape[1],
        HAS_TAKEN=taken is not None,
        HAS_GAMMA=p.gamma is not None,
        HAS_BIAS=p.bias is not None,
        HAS_BETA=needs[BETA],
        HAS_NORM_BIAS=p.norm.bias is not None,
        TURNED=folded.turned,
        TILE_ROWS=PARAMETER_ROWS,
        BLOCK=triton.next_power_of_2(folded.gram.shape[0]),
        num_warps=4,
    )
    if folded.turned and (needs[NORM_WEIGHT] or needs[NORM_BIAS]):
        _sums(parts, p, needs, found)


def _folded_gradients(
    grad: Tensor, x: Tensor, squares: Tensor, p: Projection, folded: Folded, needs: list[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(needs)
    calibrated, turned = p.calibration.group_rows > 0, folded.turned
    along = matmul_fp32(grad, folded.scaled)
    rows = _Rows(x, p, folded, squares, ones=needs[BETA])
    scaled, weighted, dots = rows.write(along)
    if needs[GAIN]:
        found[GAIN] = (dots * _unit_scale(p, squares)).sum()
    of_norm = needs[NORM_WEIGHT] or needs[NORM_BIAS]
    if needs[X] or (of_norm and not turned):
        if calibrated:
            add_matmul_fp32(along, weighted, _rounded_gram(folded, weighted.dtype), by=-1.0)
        _norm_gradients(found, needs, along, x, p, squares, turned=turned)
    if any(needs[i] for i in (WEIGHT, BIAS, GAMMA, BETA)) or (of_norm and turned):
        outer = matmul_fp32(grad.T, scaled)
        taken = _taken(folded, weighted, scaled) if calibrated else None
        _parameter_gradients(found, needs, outer, taken, p, folded)
    return found


def _tile_gradients(
    grad: Tensor, x: Tensor, squares: Tensor, p: Projection, needs: list[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(needs)
    normed, mean, rstd = normalised_rows(x, p.norm)
    tiles = Tiles(
        *(normed, p.weight),
        bias=p.bias,
        gamma=p.gamma,
        beta=None,
        calibration=p.calibration,
        tanh=p.tanh,
    )
    dots = None
    if p.calibration.group_rows or needs[GAIN] or needs[BETA]:
        dots, found[BETA] = tiles.dots(grad)
    if dots is not None and needs[GAIN]:
        shares = dots * _unit_scale(p, squares)
        found[GAIN] = shares.view(-1, p.calibration.groups).sum(0).view(p.calibration.gain.shape)
    dy, found[GAMMA], found[BIAS] = tiles.backward(grad, squares, dots)
    if needs[X] or needs[NORM_WEIGHT] or needs[NORM_BIAS]:
        d_normed = matmul_fp32(dy, tiles.weight.to(dy.dtype))
        if x.shape[1] <= TILE_VALUES:
            _norm_gradients(found, needs, d_normed, x, p)
        else:
            _wide_norm_gradients(found, d_normed, x, mean, rstd, p)
    if needs[WEIGHT]:
        found[WEIGHT] = matmul_fp32(dy.T, normed)
    return found


def project_calibrate_backward(
    grad: Tensor, x: Tensor, squares: Tensor, p: Projection, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, norm_weight, norm_bias, gamma, beta, gain, if needed.

    In fp32, or in the dtype of x or the parameter, where a kernel rounds on its way.

    Args:
        grad: `[N, D]`; x: `[N, d]`, N > 0; squares: the mean squares that forward returned.
    """
    x, grad, squares = x.contiguous(), grad.contiguous(), squares.contiguous()
    if p.folded is None:
        found = _tile_gradients(grad, x, squares, p, needs)
    else:
        found = _folded_gradients(grad, x, squares, p, p.folded, needs)
    wanted = zip(found, needs, strict=True)
    return [g.contiguous() if needed and g is not None else None for g, needed in wanted]
