"""Latents to payloads and back. One line per bottleneck: its name, and where it is."""

PARTS = {
    "uniform": "latentwire_fast.models.bottlenecks.uniform:UniformQuantizer",
    "fsq": "latentwire_fast.models.bottlenecks.fsq:FiniteScalars",
    "vq": "latentwire_fast.models.bottlenecks.vq:VectorQuantizer",
    "residual_vq": "latentwire_fast.models.bottlenecks.residual_vq:ResidualVectorQuantizer",
    "soft_codebook": "latentwire_fast.models.bottlenecks.soft_codebook:SoftCodebook",
}
