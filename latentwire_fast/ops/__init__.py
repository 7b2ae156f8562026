"""The public ops: quantisation, nearest codes, calibrated projection and distillation KL.

Each is a `torch.library` op whose CPU implementation is `latentwire_fast.reference` and whose CUDA
implementation is a Triton launcher (imported on first use), wrapped in an `autograd.Function`.
`torch.compile(fullgraph=True)` traces through all of them.

    codes, scales = ops.quantize_pack(latent, bits=4, group_size=32)
    with ops.backend("reference"):  # plain torch also on CUDA
        loss = ops.linear_kd_kl(student_hidden, teacher_hidden, lm_head.weight, tau=2.0, mask=mask)
"""

from __future__ import annotations

from latentwire_fast.ops.codes import nearest_codes
from latentwire_fast.ops.dispatch import backend
from latentwire_fast.ops.distillation import REDUCTIONS, kd_kl
from latentwire_fast.ops.linear_cross_entropy import linear_cross_entropy_kd
from latentwire_fast.ops.linear_distillation import linear_kd_kl
from latentwire_fast.ops.linear_losses import LinearLosses
from latentwire_fast.ops.packed_projection import dequantize_project_calibrate
from latentwire_fast.ops.projection import CALIBRATIONS, project_calibrate
from latentwire_fast.ops.quantization import (
    CODE_BITS,
    GROUP_SIZES,
    fake_quantize,
    quantize_pack,
    unpack_dequantize,
)

__all__ = [
    "CALIBRATIONS",
    "CODE_BITS",
    "GROUP_SIZES",
    "REDUCTIONS",
    "LinearLosses",
    "backend",
    "dequantize_project_calibrate",
    "fake_quantize",
    "kd_kl",
    "linear_cross_entropy_kd",
    "linear_kd_kl",
    "nearest_codes",
    "project_calibrate",
    "quantize_pack",
    "unpack_dequantize",
]
