"""The transformer layer that encoders and deep prefixes are built of."""

from __future__ import annotations

from torch import nn


def pre_norm_layer(
    width: int, heads: int, *, expansion: int = 4, dropout: float = 0.0
) -> nn.TransformerEncoderLayer:
    """Bidirectional attention and a GELU MLP of `expansion * width`, each behind a LayerNorm.

    Takes `[B, T, width]`.
    """
    return nn.TransformerEncoderLayer(
        width,
        heads,
        expansion * width,
        dropout=dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
