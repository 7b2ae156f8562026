"""Compiles every kernel for sm_90 at its real shapes, on any machine, and reads what came out.

No kernel may spill or use local memory, all must fit Hopper's shared memory, and where a kernel
streams tensors it must do so 16 bytes at a time. Prints a table of what was found.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bench.kernels import sass
from kernel_device import INTERPRETED, SM90_TABLE

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles; the interpreter does not")

SHARED_LIMIT = 232_448  # bytes per block on an H100 or H200
BF16, FP16, FP32, BYTE = "*bf16", "*fp16", "*fp32", "*u8"


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its runtime arguments, in order, and its compile-time ones."""

    module: str
    kernel: str
    arguments: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    # Instructions that must be there in a form of 16 bytes.
    wide: tuple[str, ...] = ("LDG", "STG")
    # Positions in `arguments` of integers that are divisible by 16 at the real shapes.
    aligned: tuple[int, ...] = field(default=())


def quantization_cases() -> dict[str, Case]:
    """Latents in bf16 with every group size; in fp32, as encoders give them, with the default."""
    cases = {}
    for bits in (8, 6, 4):
        for dtype, group in ((BF16, 16), (BF16, 32), (BF16, 64), (FP32, 32)):
            name = f"{bits} bits, groups of {group}{', fp32' if dtype == FP32 else ''}"
            cases |= quantization_trio(name, dtype, bits, group, whole=True)
        cases |= quantization_trio(f"{bits} bits, groups of 32, a short one", BF16, bits, 32)
        cases |= quantization_trio(f"{bits} bits, groups of 64, a short one, fp32", FP32, bits, 64)
        # Few values: programs of one warp, some of whose codes are less than 16 bytes a thread.
        wide = {"pack": ("LDG",), "unpack": ("STG",), "fake": ("LDG", "STG")}
        trio = quantization_trio(f"{bits} bits, groups of 32", BF16, bits, 32, whole=True)
        for name, case in trio.items():
            constants = {**case.constants, "GROUPS": 512 // 32}
            few = replace(case, constants=constants, warps=1, wide=wide[name.split(",")[0]])
            cases[f"{name}, few"] = few
    return cases


def quantization_trio(
    name: str, dtype: str, bits: int, group: int, *, whole: bool = False
) -> dict[str, Case]:
    """Packing, unpacking and both, for whole groups or a last short one."""
    shape = {"BITS": bits, "GROUP": group, "GROUPS": 4096 // group}
    clip, warps = {"CLIP": bits == 4, "INTERPRETED": False}, 4 if whole else 8
    # A group's codes are 16 bytes or more; of 6 bits the shorter of their two planes.
    long = group * (2 if bits == 6 else bits) // 8 >= 16
    both = ("LDG", "STG") if whole and long else ()
    sizes, aligned = ["i32"] * 3, (3, 4, 5) if whole else ()
    cases = {
        f"pack, {name}": Case(
            *("quantization", "_quantize_pack_kernel", (dtype, BYTE, FP16, *sizes)),
            *({**shape, **clip, "WHOLE": whole}, warps, 3, both or ("LDG",) * whole, aligned),
        ),
        f"unpack, {name}": Case(
            *("quantization", "_unpack_dequantize_kernel", (BYTE, FP16, dtype, *sizes)),
            *({**shape, "WHOLE": whole}, warps, 3, both or ("STG",) * whole, aligned),
        ),
    }
    if whole:
        cases[f"fake, {name}"] = Case(
            *("quantization", "_fake_quantize_kernel", (dtype, dtype, "i32")),
            *({**shape, **clip, "WHOLE": True}, 4, 3, ("LDG", "STG"), (2,)),
        )
    return cases


def tile(logits: str, *, wide: bool) -> dict[str, int]:
    """The tile of a row of logits, as `logit_rows.tile_shape` chooses it."""
    lanes = 8 if wide else 1
    return {"VECTORS": (8 if logits == FP32 else 16) // lanes, "THREADS": 256, "LANES": lanes}


def distillation_case(
    vocabulary: int,
    *,
    logits: str = BF16,
    grad: str = BF16,
    wide: bool = True,
    gradient: bool = True,
    **flags: bool,
) -> Case:
    """A launch of the KL kernel: of logits in bf16, or in fp32 as they come from a head."""
    constants = {
        "VOCABULARY": vocabulary,
        **tile(logits, wide=wide),
        "MASKED": True,
        "GRADIENT": gradient,
    }
    arguments = (logits, logits, "*i1", FP32, FP32, grad, *["i32"] * 3, "fp32", "fp32")
    accesses = ("LDGSTS", *(("STG",) if gradient else ()))
    return Case(
        *("distillation", "_kl_kernel", arguments),
        {"STACKED": False, "SOFTCAP": False, **constants, **flags},
        *(8, 3, accesses if wide else (), (6, 7, 8) if wide else ()),
    )


def distillation_cases() -> dict[str, Case]:
    cases = {}
    for vocabulary in (128_256, 152_064):
        cases[f"KL, V {vocabulary}"] = distillation_case(vocabulary, gradient=False)
        cases[f"KL and gradient, V {vocabulary}"] = distillation_case(vocabulary)
        cases[f"KL and gradient, V {vocabulary}, unmasked"] = distillation_case(
            vocabulary, MASKED=False
        )
        cases[f"KL and gradient, V {vocabulary}, fp32 to fp32, stacked, unmasked"] = (
            distillation_case(vocabulary, logits=FP32, grad=FP32, STACKED=True, MASKED=False)
        )
        for name, flags in (
            ("", {}),
            (", stacked", {"STACKED": True}),
            (", softcap", {"SOFTCAP": True}),
            (", stacked, softcap", {"STACKED": True, "SOFTCAP": True}),
        ):
            name = f"KL and gradient, V {vocabulary}, fp32{name}"
            cases[name] = distillation_case(vocabulary, logits=FP32, **flags)
        cases[f"scale rows, V {vocabulary}"] = Case(
            *("distillation", "_scale_rows_kernel", (BF16, FP32, "i32", "i32")),
            *({"WIDTH": vocabulary, "BLOCK": 2048}, 8, 3, ("LDG", "STG"), (2,)),
        )
    # Gemma's, whose softcap makes the largest kernel.
    cases["KL and gradient, V 256000, fp32, stacked, softcap"] = distillation_case(
        256_000, logits=FP32, STACKED=True, SOFTCAP=True
    )
    # GPT-2's vocabulary is odd: nothing is aligned, nothing 16 bytes wide.
    cases["KL and gradient, V 50257"] = distillation_case(50_257, wide=False)
    cases["KL and gradient, V 50257, fp32, stacked"] = distillation_case(
        50_257, logits=FP32, wide=False, STACKED=True
    )
    return cases


def cross_entropy_cases() -> dict[str, Case]:
    """Launches of the cross-entropy kernel on fp32 logits: the student's, or as the KL has them."""
    cases = {}
    for vocabulary, grad, flags in (
        (128_256, BF16, {}),
        (128_256, FP32, {}),
        (128_256, BF16, {"STACKED": True}),
        (128_256, BF16, {"STACKED": True, "SMOOTH": True}),
        (128_256, FP32, {"STACKED": True, "GRADIENT": False}),
        (152_064, BF16, {"STACKED": True}),
        (256_000, BF16, {"STACKED": True, "SOFTCAP": True, "SMOOTH": True}),
        (50_257, BF16, {"STACKED": True}),
    ):
        constants = {"STACKED": False, "SOFTCAP": False, "SMOOTH": False, "GRADIENT": True}
        constants |= {"VOCABULARY": vocabulary, **flags}
        arguments = (FP32, FP32, "*i64", FP32, FP32, grad, *["i32"] * 3, *["fp32"] * 3)
        accesses = ("LDGSTS", *(("STG",) if constants["GRADIENT"] else ()))
        wide = vocabulary % 16 == 0
        constants |= tile(FP32, wide=wide)
        words = ", ".join(word.lower() for word, set_ in flags.items() if set_)
        cases[f"cross-entropy, V {vocabulary}, to {grad[1:]}{', ' if words else ''}{words}"] = Case(
            *("cross_entropy", "_cross_entropy_kernel", arguments, constants),
            *(8, 3, accesses if wide else (), (6, 7, 8) if wide else ()),
        )
    return cases


def rows_case(
    mode: int,
    width: int,
    tile_rows: int,
    *,
    bits: int = 0,
    dtype: str = BF16,
    norm: bool = True,
    norm_bias: bool = True,
    gain: bool = False,
    factor: bool = True,
) -> Case:
    """A launch of a row kernel: 0 plain, 1 without calibration, 2 per row, 3 per program, 4 mean
    squares alone, 5 by those. The gain is a number, as adapters give it, or a tensor. factor: half
    precision rows have one, in the place of the Gram matrix."""
    constants = {"MODE": mode, "WIDTH": width, "OUTPUTS": 4096, "BITS": bits}
    constants |= {"PADDED": width + 8 if mode else width, "GROUP": 32 if bits else 1}
    constants |= {"HAS_NORM": norm, "HAS_NORM_BIAS": norm and norm_bias, "HAS_GAIN": gain}
    constants |= {"TILE_ROWS": tile_rows}
    source = (BYTE, FP16) if bits else (dtype, dtype)
    rest = (dtype, FP32, dtype, FP32, FP32, *["i32"] * 6, *["fp32"] * 3)
    squares = 2 <= mode <= 4
    stored = ("STG",) if mode != 4 or (dtype != FP32 and not factor) else ()
    if dtype == FP32 or width > 512:
        columns = (2048 // tile_rows if bits else 64) if mode else 4096 // tile_rows
        constants |= {"PRECISION": "tf32x3", "TILE_K": 32, "TILE": columns}
        warps = 8 if bits or tile_rows == 64 else 4
        kernel = ("projection_rows", "_rows_kernel", (*source, dtype, dtype, FP32, *rest))
        # Of a payload it reads bytes; the Gram matrix comes by asynchronous copies.
        wide = (*(() if bits else ("LDG",)), *stored, *(("LDGSTS",) if squares else ()))
        return Case(*kernel, constants, warps, 3, wide)
    from latentwire_fast.kernels.projection_halves import STAGES, half_tiling

    tile, warps = half_tiling(tile_rows, width, factor=factor)
    turned = bool(mode) and norm
    constants |= {"HAS_FACTOR": factor, "TURNED": turned, **tile}
    constants["PADDED"] -= 8 if turned else 0
    pointers = (*source, dtype, dtype, FP32, dtype, FP32, *rest)
    kernel = ("projection_halves", "_half_rows_kernel", pointers)
    # Codes of 6 bits lie in planes of 16 and 8 bytes a group.
    read = () if bits == 6 or (bits and tile_rows < 64) else ("LDG",)
    # One step is no loop, whose next step asynchronous copies would fetch.
    wide = (*read, *stored, *(("LDGSTS",) if squares and width > tile["TILE"] else ()))
    return Case(*kernel, constants, warps, STAGES, wide)


def rows_cases() -> dict[str, Case]:
    cases = {
        "rows 256, LayerNorm": rows_case(0, 256, 16),
        "rows 4096, LayerNorm": rows_case(0, 4096, 1),
        "rows 256, 4 bits, LayerNorm": rows_case(0, 256, 16, bits=4),
        "rows 256, uncalibrated": rows_case(1, 256, 64),
        "rows 256, tile 16, bf16, factor, gain": rows_case(2, 256, 16, gain=True),
        "rows 256, tile 64, bf16, by mean squares": rows_case(5, 256, 64, bits=6),
        "rows 256, tile 32, bf16, by mean squares": rows_case(5, 256, 32, bits=6),
    }
    for tile_rows, width in ((16, 256), (32, 256), (64, 256), (16, 512), (32, 512), (64, 48)):
        for factor in (True, False):
            name = f"rows {width}, tile {tile_rows}, bf16, {'factor' if factor else 'Gram'}"
            cases[name] = rows_case(2, width, tile_rows, factor=factor)
    for tile_rows, width in ((16, 256), (64, 256), (16, 512), (64, 512), (16, 48)):
        cases[f"rows {width}, tile {tile_rows}, fp32, Gram"] = rows_case(
            2, width, tile_rows, dtype=FP32
        )
    for bits in (8, 6, 4):
        for tile_rows in (16, 32, 64):
            name = f"rows 256, tile {tile_rows}, {bits} bits"
            cases[f"{name}, factor"] = rows_case(3, 256, tile_rows, bits=bits)
        for factor in (True, False):
            for tile_rows in (32, 64):
                name = f"rows 256, tile {tile_rows}, {bits} bits, mean squares"
                cases[f"{name}, {'factor' if factor else 'Gram'}"] = rows_case(
                    4, 256, tile_rows, bits=bits, factor=factor
                )
    cases["rows 512, tile 32, 4 bits, factor"] = rows_case(3, 512, 32, bits=4)
    # The parts that unpacking, LayerNorm and the product leave fewest registers in.
    few: list[tuple[int, int, int, int, str, dict[str, bool]]] = [
        (2, 256, 16, 6, BF16, {"norm_bias": False}),
        (3, 256, 16, 8, BF16, {"norm": False}),
        (2, 64, 64, 6, FP32, {}),
        (3, 64, 32, 6, FP32, {}),
        (3, 64, 64, 6, FP32, {}),
        (4, 256, 16, 8, FP32, {}),
        (4, 256, 64, 0, FP32, {}),
        (5, 256, 64, 6, FP32, {}),
        (3, 256, 64, 4, FP32, {}),
    ]
    for mode, width, tile_rows, bits, dtype, parts in few:
        name = f"rows {width}, tile {tile_rows}, {bits or 32} bits, {dtype[1:]}, mode {mode}"
        cases[name] = rows_case(mode, width, tile_rows, bits=bits, dtype=dtype, **parts)
    return cases


def projection_cases() -> dict[str, Case]:
    cases = rows_cases()
    for width in (256, 512):
        for turned in (True, False):
            cases |= gradient_cases(width, turned)
    return {**cases, **tiles_cases()}


def gradient_cases(width: int, turned: bool) -> dict[str, Case]:
    """The fold, and what backward starts, of turned rows or of padded ones."""
    cases = {}
    padded, outer = (width, width + 8) if turned else (width + 8, width + 8)
    name = f"{width}{', turned' if turned else ''}"
    shape = {"WIDTH": width, "PADDED": padded, "TURNED": turned, "HAS_NORM_BIAS": True}
    folded = {**shape, "HAS_BIAS": True, "HAS_GAMMA": True, "TILE_ROWS": 8}
    folded |= {"HAS_NORM_BIAS": turned, "BLOCK": width if turned else 2 * width}
    cases[f"fold {name}"] = Case(
        *("projection", "_fold_kernel", (*[BF16] * 7, "i32"), folded, 4),
    )
    rows = {"BLOCK": width, "TILE_ROWS": 4096 // width, "CALIBRATED": True, "HAS_GAIN": True}
    rows |= {"HAS_NORM": True}
    for mode, what in enumerate(("dots", "write", "both")):
        cases[f"gradient rows {name}, {what}"] = Case(
            *("projection_gradients", "_gradient_rows_kernel"),
            (*[BF16] * 4, *[FP32] * 3, BF16, BF16, "i32", "i32", *["fp32"] * 3),
            {**shape, **rows, "MODE": mode, "OUTER": outer, "OUTPUTS": 4096},
            *(4, 3, ("STG",) if mode == 1 else ("LDG",)),
        )
    norm = {
        "WIDTH": width,
        "STRIDE": padded,
        "SCALED": True,
        "TURNED": turned,
        "SUMS": not turned,
        **rows,
    }
    cases[f"LayerNorm's gradient {name}"] = Case(
        *("projection_gradients", "_norm_gradient_kernel"),
        (BF16, FP32, BF16, BF16, FP32, BF16, FP32, *["i32"] * 2, *["fp32"] * 3),
        *(norm, 4, 3, ("LDG", "STG")),
    )
    flags = ("HAS_TAKEN", "HAS_GAMMA", "HAS_BIAS", "HAS_BETA")
    block = width if turned else 2 * width
    parameters = {**shape, **dict.fromkeys(flags, True), "OUTER": outer}
    cases[f"parameters' gradients {name}"] = Case(
        *("projection_gradients", "_parameters_kernel"),
        (FP32, FP32, *[BF16] * 9, FP32, "i32"),
        *({**parameters, "TILE_ROWS": 8, "BLOCK": block}, 4, 3, ("LDG", "STG")),
    )
    sums = {"HAS_SECOND": True, "WIDTH": width, "STEPS": 8, "TILE_PARTS": 128, "TILE": 16}
    cases[f"sums {width}"] = Case(
        *("projection_gradients", "_sums_kernel", (FP32, BF16, BF16, "i32"), sums, 4, 3, ("LDG",)),
    )
    return cases


def tiles_cases() -> dict[str, Case]:
    flags = dict.fromkeys(("HAS_BIAS", "HAS_GAMMA", "HAS_BETA", "CALIBRATED"), True)
    cases = {}
    for mode, name in enumerate(("squares", "write", "dots", "gradient")):
        for inner, width, tanh, dtype in (
            (256, 4096, True, BF16),
            (256, 3584, True, BF16),
            (4096, 4096, False, BF16),
            (256, 4096, True, FP32),
        ):
            out = FP32 if mode in (0, 2) else dtype
            # 2: the approximate tanh, for half precision.
            f = (1 if dtype == FP32 else 2) if tanh else 0
            shape = {"MODE": mode, "INNER": inner, "WIDTH": width, "ACTIVATION": f, "GROUPS": 1}
            shape["GROUP_ROWS"] = int(name == "write")
            tile = {"BAND": 8, "TILE_ROWS": 128, "TILE_K": 64}
            tile["TILE_COLUMNS"] = 64 if dtype == FP32 else 128
            stored, wide = inner > 256, ", fp32" if dtype == FP32 else ""
            cases[f"tiles {inner} to {width}{', tanh' if tanh else ''}{wide}, {name}"] = Case(
                *("projection_tiles", "_tiles_kernel"),
                (*[dtype] * 7, FP32, FP32, dtype, out, FP32, "i32", "i32", "fp32", "fp32"),
                {**shape, "HAS_Y": stored, "HAS_GAIN": False, **flags, **tile},
                *(8, 3, ("LDG",) if stored else ("LDGSTS",)),
            )
    cases |= grouped_cases(flags)
    name = "tiles 256 to 4096, tanh, fp32, gradient"
    constants = {**cases[name].constants, "HAS_GAMMA": False}
    cases[f"{name}, no gamma"] = replace(cases[name], constants=constants)
    return cases


def grouped_cases(flags: dict[str, bool]) -> dict[str, Case]:
    """A deep prefix's projection: keys and values of 32 layers of 8 heads of 128 channels, its
    product stored; of 4 layers of 2 heads of 32; groups that no tile's width divides."""
    cases = {}
    for mode, name in enumerate(("squares", "write", "dots", "gradient")):
        for inner, groups, width, dtype, columns in (
            (512, 64, 1024, BF16, 128),
            (512, 64, 1024, FP32, 64),
            (256, 64, 1024, BF16, 128),
            (256, 8, 64, BF16, 64),
            (256, 8, 64, FP32, 64),
            (64, 56, 96, BF16, 128),
        ):
            out = FP32 if mode in (0, 2) else dtype
            shape = {"MODE": mode, "INNER": inner, "WIDTH": groups * width, "GROUPS": groups}
            tile = {"BAND": 8, "TILE_ROWS": 128, "TILE_K": 64, "TILE_COLUMNS": columns}
            shape["GROUP_ROWS"] = 32 if name == "write" else 0
            absent = {"HAS_GAMMA": False, "HAS_BETA": False, "ACTIVATION": 0}
            stored = inner > 256
            wide = ", fp32" if dtype == FP32 else ""
            cases[f"tiles {inner} to {groups} groups of {width}{wide}, {name}"] = Case(
                *("projection_tiles", "_tiles_kernel"),
                (*[dtype] * 6, FP32, FP32, FP32, dtype, out, FP32, "i32", "i32", "fp32", "fp32"),
                {**flags, **absent, **shape, "HAS_Y": stored, "HAS_GAIN": True, **tile},
                # One step of 64 is no loop, whose next step asynchronous copies would fetch.
                *(8, 3, ("LDG",) if stored or inner <= 64 else ("LDGSTS",)),
            )
        # One example of 32 rows.
        few = cases[f"tiles 512 to 64 groups of 1024, {name}"]
        cases[f"tiles 512 to 64 groups of 1024, 32 rows, {name}"] = replace(
            few, constants={**few.constants, "TILE_ROWS": 32}, warps=4
        )
    return cases


def codes_cases() -> dict[str, Case]:
    """Codebooks of the sizes that bottlenecks have, for rows in fp32, and one for rows in bf16."""
    from latentwire_fast.kernels.codes import NUM_WARPS, STAGES, constants_of

    cases = {}
    for dtype, codes, width in ((FP32, 512, 16), (FP32, 4096, 64), (FP32, 512, 256), (BF16, 64, 8)):
        name = f"nearest of {codes} codes of {width}{', bf16' if dtype == BF16 else ''}"
        cases[name] = Case(
            *("codes", "_nearest_kernel", (dtype, FP32, FP32, "*i64", "i32")),
            *(constants_of(codes, width), NUM_WARPS, STAGES, ()),
        )
    return cases


CASES = {
    **quantization_cases(),
    **codes_cases(),
    **projection_cases(),
    **distillation_cases(),
    **cross_entropy_cases(),
}


def compiled(case: Case) -> Any:
    """The kernel for sm_90, specialised as the launcher would: aligned pointers and sizes."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"latentwire_fast.kernels.{case.module}"), case.kernel)
    names = iter(case.arguments)
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[(position,)] = case.constants[name]
            continue
        kind = next(names)
        signature[name] = kind
        if kind.startswith("*") or position in case.aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": case.warps,
        "num_stages": case.stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def tool(name: str) -> str:
    """One of the CUDA tools that Triton brings along."""
    path = sass.tool(name)
    if path is None:
        pytest.skip(f"this Triton has no {name}")
    return path


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def global_accesses(assembly: str) -> Counter[tuple[str, int]]:
    """How many instructions of each kind and width, in bytes per thread."""
    found: Counter[tuple[str, int]] = Counter()
    for line in assembly.splitlines():
        if access := sass.width(re.sub(r"^\s*/\*[0-9a-f]+\*/\s+", "", line)):
            found[access] += 1
    return found


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_hopper_without_spills(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    kernel = compiled(case)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assembly = run(tool("nvdisasm"), str(cubin))
    accesses, shared = global_accesses(assembly), kernel.metadata.shared
    listed = ", ".join(f"{kind} {width}x{n}" for (kind, width), n in sorted(accesses.items()))
    row = (name, found["REG"], shared, found["STACK"], found["LOCAL"], listed)
    record_property(SM90_TABLE, row)
    assert found["STACK"] == 0
    assert found["LOCAL"] == 0
    assert not re.search(r"\b(LDL|STL)\b", assembly)
    assert shared <= SHARED_LIMIT
    for kind in case.wide:
        assert accesses[kind, 16], f"no {kind} of 16 bytes: the accesses are narrower"


def test_widths_are_read_from_the_assembly() -> None:
    lines = (
        "LDG.E.128 R4, desc[UR4][R2.64] ;",
        "@!P0 LDG.E.U16.CONSTANT R1, desc[UR4][R2.64+0x10] ;",
        "LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;",
        "STG.E desc[UR4][R2.64], R5 ;",
        "STS.128 [R0], R4 ;",
    )
    found = global_accesses("\n".join(lines))
    assert found == {("LDG", 16): 1, ("LDG", 2): 1, ("LDGSTS", 16): 1, ("STG", 4): 1}
