"""Compile every kernel for a GPU that need not be here: python compile_kernels.py CAPABILITY LIMIT. Not a test.

LIMIT is the shared memory that one program may take; prints what each takes, as one JSON object, in bytes.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from quantmill.kernels.triton import linear, many, tuning
from quantmill.kernels.triton.expand import dense_kernel
from quantmill.kernels.triton.few import few_kernel
from quantmill.kernels.triton.held import held_kernel
from quantmill.kernels.triton.packing import TiledLinear, tile_shape
from quantmill.kernels.triton.parts import parts_kernel
from quantmill.kernels.triton.repack import dequantise_kernel, repack_kernel
from quantmill.kernels.triton.wide import wide_kernel

POINTERS = {
    "qweight": "*i32", "order": "*i32", "bias": "*fp16", "sums": "*fp32", "arrived": "*i32", "position": "*i32",
    "after": "*fp16", "gain": "*fp16", "squares": "*fp32", "normed": "*fp32",
}  # fmt: skip
NUMBERS = dict.fromkeys(("times", "scale", "unscale", "inverse", "epsilon"), "fp32")
WHOLE = ("N", "K", "units", "stride", "y_stride", "after_stride")  # multiples of 16 in real calls


def compiled(kernel, constants: dict, capability: int, types: dict[str, str]):
    """The kernel with aligned pointers, as real calls have them."""
    names = kernel.arg_names
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4), "maxnreg": constants.pop("maxnreg", None)}
    kinds = {**POINTERS, **NUMBERS, **types}
    kinds = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    whole = [n for n in names if kinds[n].startswith("*") or n in WHOLE]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def shapeless(bits: int, group: int, extra: bool, k: int = 2048) -> TiledLinear:
    """A linear of 1024 outputs that has a shape and no memory."""
    shape = tile_shape(bits, group, k)
    units = -(-k // shape.columns)
    words = torch.empty(64, units, shape.words, 32, 4, dtype=torch.int32, device="meta")
    scales = torch.empty(64, -(-units * shape.columns // shape.group), 8, dtype=torch.int32, device="meta")
    return TiledLinear(words, scales, scales if extra else None, None, None, shape, k, 1024)


def few(capability: int, tiled: TiledLinear, rows: int, dtype: torch.dtype, end: int):
    """With everything that may come before and after, one after the other."""
    x = torch.empty(rows, tiled.in_features, dtype=dtype, device="meta")
    cut = tuning.rule_cut(tiled, tuning.block_of(rows), *tuning.rule_slices(tiled))
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    types = {
        "x": "*i32",
        "words": "*i32",
        "scales": "*i32",
        "zeros": "*i32",
        "y": "*fp32" if end == 2 else f"*{name}",
    }
    extra = {"END": end, "COUNT": 64 if end else 0, "HAS_POSITION": end > 0, "PDL": capability >= 90}
    return compiled(few_kernel, linear._constants(tiled, x, cut) | extra, capability, types)


def held(capability: int, tiled: TiledLinear, end: int):
    cut = tuning.Cut(16, 8, 4, 2, 1, 1, 1, True, True, False, 1)
    x = torch.empty(16, tiled.in_features, dtype=torch.float16, device="meta")
    types = {
        "x": "*i32",
        "words": "*i32",
        "scales": "*i32",
        "zeros": "*i32",
        "y": "*fp32" if end == 2 else "*fp16",
    }
    extra = {"END": end, "COUNT": 64 if end else 0, "HAS_POSITION": end > 0, "PDL": capability >= 90}
    constants = linear.staying_constants(linear._constants(tiled, x, cut)) | extra
    return compiled(held_kernel, constants, capability, types)


def parts(tiled: TiledLinear, rows: int, dtype: torch.dtype):
    from triton.experimental.gluon import language as gl

    cut = tuning.simple_wide(rows)
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    x = f"tensordesc<{name}[{cut.rows}, {tuning.STEP}],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
    types = {"x": x, "y": f"*{name}", "words": "*i16", "scales": "*i16", "zeros": "*i16"}
    constants = many.parts_constants(tiled, dtype, cut) | {"HAS_BIAS": True, "SPLIT": True, "PDL": True}
    return compiled(parts_kernel, constants, 90, types)


def wide(tiled: TiledLinear, rows: int, dtype: torch.dtype):
    from triton.experimental.gluon import language as gl

    cut = tuning.WideCut(rows, 8, 1, 1)
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    lines = repr(gl.NVMMASharedLayout(128, 16, 2))
    x = f"tensordesc<{name}[{cut.rows}, {tuning.STEP}],{lines}>"
    y = f"tensordesc<{name}[{min(cut.rows, 64)}, {16 * cut.warps}],{lines}>"
    types = {"x": x, "y": y, "words": "*i16", "scales": "*i16", "zeros": "*i16"}
    extra = {"HAS_BIAS": True, "PDL": True}
    return compiled(wide_kernel, many.wide_constants(tiled, dtype, cut) | extra, 90, types)


def dense(capability: int, tiled: TiledLinear, name: str):
    shape = tiled.shape
    constants = {
        "BITS": shape.bits, "GROUP_PLANES": shape.group_planes, "NARROW": shape.narrow,
        "HAS_ZERO": tiled.zeros is not None, "BF16": name == "bf16", "WARPS": 4,
    }  # fmt: skip
    types = {"words": "*i16", "scales": "*i16", "zeros": "*i16", "weight": f"*{name}"}
    return compiled(dense_kernel, constants, capability, types)


def main() -> None:
    report = {}
    capability, limit = int(sys.argv[1]), int(sys.argv[2])
    for bits, group in ((2, 128), (3, 128), (4, 128), (8, 128), (3, 16), (4, 16)):
        plain, extra = shapeless(bits, group, False), shapeless(bits, group, True)
        basic = {"BITS": bits, "NARROW": plain.shape.narrow}
        types = {"words": "*i32", "scales": "*fp16", "zeros": "*fp16", "weight": "*fp16"}
        report[f"repack {bits} {group}"] = compiled(repack_kernel, basic | {"TILES": 8}, capability, types)
        old = basic | {"HAS_ZERO": True, "BN": 64}
        report[f"plain {bits} {group}"] = compiled(dequantise_kernel, old, capability, types)
        report[f"dense {bits} {group}"] = dense(capability, extra, "bf16")
        report[f"few {bits} {group} 1"] = few(capability, plain, 1, torch.float16, 1)
        report[f"few {bits} {group} 16"] = few(capability, extra, 16, torch.bfloat16, 0)
        report[f"few {bits} {group} 32"] = few(capability, plain, 32, torch.float16, 2)
    for end, bits in enumerate((4, 3, 8)):
        report[f"held {bits}"] = held(capability, shapeless(bits, 32, end == 0), end)
    if capability == 90:
        for bits, group, rows in ((4, 128, 32), (3, 128, 64), (2, 32, 128), (8, -1, 256), (4, 32, 128)):
            dtype = torch.bfloat16 if group == 32 else torch.float16
            tiled = shapeless(bits, group, group == 32)
            report[f"wide {bits} {group} {rows}"] = wide(tiled, rows, dtype)
            report[f"parts {bits} {group} {rows}"] = parts(tiled, rows, dtype)
    over = [name for name, kernel in report.items() if kernel.metadata.shared > limit]
    assert not over, over
    print(json.dumps({name: kernel.metadata.shared for name, kernel in report.items()}))


if __name__ == "__main__":
    main()
