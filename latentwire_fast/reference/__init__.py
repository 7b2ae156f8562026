"""Every op as its formula in plain torch: the specification, the CPU path, the tests' oracle.

Shapes: `B` batch, `M` latents, `d` latent width, `n = M*d`, `G` groups of `g` values, `D` reader
width, `N` rows (tokens), `V` vocabulary. Arithmetic is fp32, or fp64 for fp64 inputs, whatever the
storage dtype. Nothing here checks its arguments: `latentwire_fast.ops` does, and is what other
modules call.
"""

from latentwire_fast.reference.codes import bounded, level_values, nearest_codes
from latentwire_fast.reference.distillation import (
    BLOCK_ELEMENTS,
    gradient_unit,
    kd_kl,
    scale_rows,
)
from latentwire_fast.reference.linear_losses import (
    Heads,
    LossResults,
    LossRows,
    LossSettings,
    linear_losses,
    result_shapes,
    row_factors,
)
from latentwire_fast.reference.precision import compute_dtype
from latentwire_fast.reference.projection import (
    LAYER_NORM_EPS,
    RMS_EPS,
    ProjectionParameters,
    ProjectionSettings,
    dequantize_project_calibrate,
    project_calibrate,
    project_calibrate_backward,
)
from latentwire_fast.reference.quantization import (
    LARGEST_FP16,
    code_bytes,
    fake_quantize,
    largest_code,
    largest_value,
    pack_codes,
    quantize,
    quantize_pack,
    unpack_codes,
    unpack_dequantize,
)

__all__ = [
    "BLOCK_ELEMENTS",
    "LARGEST_FP16",
    "LAYER_NORM_EPS",
    "RMS_EPS",
    "Heads",
    "LossResults",
    "LossRows",
    "LossSettings",
    "ProjectionParameters",
    "ProjectionSettings",
    "bounded",
    "code_bytes",
    "compute_dtype",
    "dequantize_project_calibrate",
    "fake_quantize",
    "gradient_unit",
    "kd_kl",
    "largest_code",
    "largest_value",
    "level_values",
    "linear_losses",
    "nearest_codes",
    "pack_codes",
    "project_calibrate",
    "project_calibrate_backward",
    "quantize",
    "quantize_pack",
    "result_shapes",
    "row_factors",
    "scale_rows",
    "unpack_codes",
    "unpack_dequantize",
]
