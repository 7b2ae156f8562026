"""The cost of a prefill: its floor, and how long it should take, from shapes and rates alone.

The floor counts what no implementation can do without: every weight read once, the cache written,
the multiplications. The prediction counts the kernels that transformers' decoder layer really
launches, each at least one launch long, with the traffic of its unfused elementwise ones.

    python bench/prefill_latency.py --predict

Shapes: B rows, T new positions of each, P positions in the cache before them, R payloads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bench.kernels.ceilings import Ceilings, Stage, best_seconds
from latentwire_fast.readers.shapes import Dims

# Shares of the rate of one large matmul that a model's matmuls and flash attention come to.
MATMUL_SHARE = 0.85
ATTENTION_SHARE = 0.5
# Tokens are computed in tiles of so many rows.
TILE_ROWS = 64
# Seconds of CPU time per kernel, where each is launched from Python.
EAGER_LAUNCH_SECONDS = 6.5e-6
# Launches and traffic that the elementwise kernels of a layer keep when they are compiled.
COMPILED_SHARE = 0.3
# Host work before the first kernel: tokenising, per token; checking and sending payloads, per row.
TOKENISE_SECONDS = 1.2e-6
PARSE_SECONDS = 2e-5


@dataclass(frozen=True)
class Kernels:
    """`count` launches that share this traffic (bytes) and arithmetic evenly."""

    count: int
    traffic: float
    flops: float = 0.0
    share: float = 1.0
    fusible: bool = False

    def seconds(self, rates: Ceilings, *, engine: str) -> float:
        """Seconds that they take on the GPU, one after the other."""
        kept = COMPILED_SHARE if self.fusible and engine == "compile" else 1.0
        busy = max(
            kept * self.traffic / rates.bytes_per_second,
            self.flops / (self.share * rates.flops_per_second),
        )
        return max(busy, kept * self.count * rates.launch_seconds)


@dataclass(frozen=True)
class Pass:
    """A decoder reading T new positions of B rows behind P others.

    Attributes:
        element: bytes of a weight.
        decodes: it keeps its cache and gives logits; an encoder does neither.
    """

    dims: Dims
    rows: int
    new: int
    past: int = 0
    element: int = 2
    decodes: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.new

    @property
    def layer_weights(self) -> int:
        """Weights of the matmuls of one layer."""
        d = self.dims
        attention = d.width * d.head_width * (2 * d.heads + 2 * d.kv_heads)
        return attention + 3 * d.width * d.inner

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache after the pass, per row."""
        d = self.dims
        positions = self.past + self.new
        return 2 * d.layers * d.kv_heads * d.head_width * positions * self.element

    @property
    def attention_flops(self) -> int:
        """Operations of attention in one layer: scores and sums, for the positions before each."""
        pairs = self.new * self.past + self.new * (self.new + 1) // 2
        return 4 * self.rows * self.dims.heads * self.dims.head_width * pairs

    @property
    def flops(self) -> int:
        """Matmuls and attention of all layers, and the head at the last position of each row."""
        d = self.dims
        body = 2 * self.tokens * self.layer_weights + self.attention_flops
        return d.layers * body + (2 * self.rows * d.width * d.vocabulary if self.decodes else 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all matmuls, the head with them."""
        d = self.dims
        head = d.width * d.vocabulary if self.decodes else 0
        return (d.layers * self.layer_weights + head) * self.element

    @property
    def traffic(self) -> int:
        """Weights once; the tokens' embeddings; the cache read and written."""
        embeddings = self.tokens * self.dims.width * self.element
        cache = self.rows * self.kv_bytes if self.decodes else 0
        return self.weight_bytes + embeddings + cache

    def kernels(self) -> Iterable[Kernels]:
        """The kernels that transformers launches."""
        d, e, n = self.dims, self.element, self.tokens
        tiled = self.rows * self.new + -(self.rows * self.new) % TILE_ROWS
        q, kv = d.heads * d.head_width, d.kv_heads * d.head_width
        matmul_out = 2 * d.width + q + 2 * kv + 2 * d.inner
        matmul_in = 3 * d.width + q + d.width + d.inner
        layer = [
            Kernels(
                7,
                (self.layer_weights + n * (matmul_in + matmul_out)) * e,
                2 * tiled * self.layer_weights,
                MATMUL_SHARE,
            ),
            # Two norms of eight kernels, in fp32 between their ends.
            Kernels(16, 2 * n * d.width * (5 * e + 22), fusible=True),
            # Rotary embedding of queries and keys; the cache; attention and its transposition.
            Kernels(10, 9 * n * (q + kv) * e, fusible=True),
            Kernels(2, 4 * n * kv * e),
            Kernels(
                2,
                (2 * n * q + 2 * self.rows * (self.past + self.new) * kv + 2 * n * q) * e,
                self.attention_flops,
                ATTENTION_SHARE,
            ),
            # Gate and product, residual sums.
            Kernels(4, n * (5 * d.inner + 6 * d.width) * e, fusible=True),
        ]
        for _ in range(d.layers):
            yield from layer
        yield Kernels(20, n * d.width * (6 * e + 11))
        if self.decodes:
            weights = d.width * d.vocabulary
            yield Kernels(2, weights * e, 2 * self.rows * weights, MATMUL_SHARE)


@dataclass(frozen=True)
class Trained:
    """A trained part: multiplications of `rows` positions with `weights` weights."""

    rows: int
    weights: int
    launches: int
    element: int = 2

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.weights

    @property
    def traffic(self) -> int:
        return self.weights * self.element

    def kernels(self) -> Iterable[Kernels]:
        yield Kernels(self.launches, self.traffic, self.flops, MATMUL_SHARE)


@dataclass(frozen=True)
class PrefillCost:
    """Everything between a request and its first token.

    Attributes:
        parts: on the device, one after the other.
        link_bytes: from the host to the device.
        tokens: that are tokenised; payloads: that are parsed.
    """

    parts: tuple[Pass | Trained, ...]
    link_bytes: float = 0.0
    tokens: int = 0
    payloads: int = 0

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which nothing comes."""
        device = sum(ceilings.floor(Stage(part.traffic, part.flops)) for part in self.parts)
        return device + self.link_bytes / ceilings.link_bytes_per_second

    def predict(self, rates: Ceilings, *, engine: str) -> float:
        """Seconds that it should take."""
        kernels = [kernel for part in self.parts for kernel in part.kernels()]
        device = sum(kernel.seconds(rates, engine=engine) for kernel in kernels)
        if engine == "eager":
            device = max(device, EAGER_LAUNCH_SECONDS * sum(k.count for k in kernels))
        host = TOKENISE_SECONDS * self.tokens + PARSE_SECONDS * self.payloads
        return device + host + self.link_bytes / rates.link_bytes_per_second


def cpu_ceilings(dtype: torch.dtype) -> Ceilings:
    """Ceilings of this CPU: a copy that no cache holds, and a matmul, with torch's threads."""
    source = torch.ones(2**26, dtype=torch.uint8)
    target = torch.empty_like(source)
    side = 1024
    square = torch.randn(side, side).to(dtype)
    one = torch.zeros(1)
    copy = best_seconds(lambda: target.copy_(source))
    return Ceilings(
        name="CPU",
        bytes_per_second=2 * 2**26 / copy,
        flops_per_second=2 * side**3 / best_seconds(lambda: square @ square),
        launch_seconds=best_seconds(lambda: one.add_(1)),
        link_bytes_per_second=2 * 2**26 / copy,
        l2_bytes=0,
    )
