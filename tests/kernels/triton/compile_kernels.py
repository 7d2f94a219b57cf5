"""Compile every kernel for a GPU that need not be here: python compile_kernels.py CAPABILITY LIMIT. Not a test.

LIMIT is the shared memory that one program may take; prints what each takes, as one JSON object, in bytes.
"""

from __future__ import annotations

import itertools
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantmill.kernels.triton import tuning
from quantmill.kernels.triton.packing import TileShape, tile_shape
from quantmill.kernels.triton.product import product_kernel
from quantmill.kernels.triton.repack import dequantise_kernel, repack_kernel

POINTERS = {
    "qweight": "*i32", "order": "*i32", "words": "*i16", "scales": "*fp16", "zeros": "*i8", "bias": "*fp16",
    "sums": "*fp32", "arrived": "*i32",
}  # fmt: skip


def compiled(kernel, constants: dict, capability: int, dtype: str, warps: int = 4, stages: int = 3):
    """The kernel with aligned pointers, as real calls have them."""
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    kinds |= {n: "*" + dtype for n in ("x", "y", "weight") if n in names}
    whole = [n for n in names if kinds[n].startswith("*") or n in ("rows", "stride", "K", "N")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def shape_constants(shape: TileShape) -> dict:
    return {"BITS": shape.bits, "PLACES": shape.places, "GROUP_PLANES": shape.group_planes}


def product(capability: int, limit: int, shape: TileShape, block: int, dtype: str, extra: bool):
    """`extra`: with zero points and a true act order."""
    cut = tuning.fitted(tuning.rule_cut(block, 4), block, shape, limit - 4096)
    constants = shape_constants(shape) | {
        "HAS_ZERO": extra, "HAS_ORDER": extra, "HAS_BIAS": False, "WHOLE": True, "BF16": dtype == "bf16",
        "PARTS": cut.parts, "BM": block, "BN": cut.rows, "ASM": True, "PDL": capability >= 90, "AHEAD": 4,
    }  # fmt: skip
    return compiled(product_kernel, constants, capability, dtype, cut.warps, cut.stages)


def main() -> None:
    report = {}
    capability, limit = int(sys.argv[1]), int(sys.argv[2])
    for bits, group in itertools.product((2, 3, 4, 8), (16, 128)):
        shape = tile_shape(bits, group, 4096)
        constants = {"BITS": bits, "PLACES": shape.places, "BN": 64}
        report[f"repack {bits} {group}"] = compiled(repack_kernel, constants, capability, "fp16")
        flags = {"HAS_ZERO": True, "HAS_ORDER": True, "BF16": False, "BN": 64, "ASM": True}
        dense = compiled(dequantise_kernel, shape_constants(shape) | flags, capability, "fp16")
        report[f"dense {bits} {group}"] = dense
        for block, dtype, extra in ((16, "fp16", False), (16, "bf16", True), (128, "fp16", False)):
            name = f"product {bits} {group} {block} {dtype}"
            report[name] = product(capability, limit, shape, block, dtype, extra)
    print(json.dumps({name: kernel.metadata.shared for name, kernel in report.items()}))


if __name__ == "__main__":
    main()
