"""Compile the decoder's kernels for a GPU that need not be here: python FILE CAPABILITY. Not a test.

Prints the shared memory that one program of each takes, as one JSON object, in bytes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantmill.runtime.gpu import ops
from quantmill.runtime.gpu.kernels.attention import rows_kernel, tile_kernel
from quantmill.runtime.gpu.kernels.dense import dense_kernel
from quantmill.runtime.gpu.kernels.norms import norm_kernel, silu_kernel, start_kernel
from quantmill.runtime.gpu.kernels.rotary import cache_kernel, turn_kernel
from quantmill.runtime.gpu.kernels.sampling import draw_kernel, peaks_kernel

FLOAT32 = (
    "query_norm",
    "key_norm",
    "cosines",
    "sines",
    "residual",
    "gain",
    "bias",
    "y",
    "logits",
    "sharpness",
    "top_ps",
    "uniforms",
    "squares",
)
WORDS = ("sums", "tops")
INTEGERS = (
    "positions",
    "sequences",
    "pages",
    "tiles",
    "places_of",
    "turns_of",
    "order",
    "tokens",
    "top_ks",
    "steps",
    "drawn",
    "position",
)
HALVES = ("key_scales", "value_scales")
ACTIVATIONS = ("qkv", "out", "x", "weight", "added", "gate_up", "embedding", "after", "turned")
SCALARS = ("epsilon", "times", "scale", "unscale")
HEADS = {"H": 32, "KVH": 8, "D": 128, "BLOCK_D": 128, "PAGE": 64, "EPSILON": 1e-5, "HAS_NORM": False}


def compiled(
    kernel: Any, constants: dict[str, Any], capability: int, dtype: str, warps: int, stages: int
) -> Any:
    """The kernel with aligned pointers, as real calls have them."""
    fp8 = constants.get("FP8", False)
    names, kinds = kernel.arg_names, {}
    for name in names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in FLOAT32:
            kinds[name] = "*fp32"
        elif name in WORDS:
            kinds[name] = "*i64" if constants.get("POSTED") else "*fp32"
        elif name in INTEGERS or (name == "places" and "logits" in names):
            kinds[name] = "*i32"
        elif name in HALVES:
            kinds[name] = "*fp16"
        elif name in ("keys", "values", "next_keys", "next_values"):
            kinds[name] = "*u8" if fp8 else "*" + dtype
        elif name in ACTIVATIONS:
            kinds[name] = "*" + dtype
        else:
            kinds[name] = "fp32" if name in SCALARS else "i32"
    whole = [n for n in names if kinds[n].startswith("*") or n in ("K", "N", "places")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    capability = int(sys.argv[1])
    early, report = capability >= 90, {}
    for dtype in ("fp16", "bf16"):
        for fp8 in (False, True)[: 1 + (capability >= 89)]:
            shared = {**HEADS, "FP8": fp8}
            rows = {
                "SCALE": 0.09,
                "ROWS": 16,
                "GROUP": 4,
                "PARTS": 16,
                "BLOCK": 128,
                "HAS_ORDER": False,
                "POSTED": early and dtype == "fp16",
                "PACK": 4,
                "NEXT": early and dtype == "fp16",
                "WRITES": True,
                "AHEAD": 2,
                "PDL": early,
            }
            tile = {"SCALE": 0.09, "ROWS": 64, "HAS_ORDER": False, "HAS_WINDOW": True}
            report[f"rows {dtype} {fp8}"] = compiled(
                rows_kernel, {**shared, **rows}, capability, dtype, ops.ROW_WARPS, 1
            )
            report[f"tile {dtype} {fp8}"] = compiled(tile_kernel, {**shared, **tile}, capability, dtype, 4, 3)
            report[f"cache {dtype} {fp8}"] = compiled(
                cache_kernel, {**shared, "BLOCK": 16, "PDL": early}, capability, dtype, 1, 3
            )
        report[f"turn {dtype}"] = compiled(turn_kernel, {**HEADS, "BLOCK": 16}, capability, dtype, 4, 3)
        norm = {
            "EPSILON": 1e-5,
            "EMBED": False,
            "HAS_ADDED": True,
            "HAS_ORDER": True,
            "BLOCK": 4096,
            "BLOCK_OUT": 4096,
            "PDL": early,
        }
        report[f"norm {dtype}"] = compiled(norm_kernel, norm, capability, dtype, 8, 3)
        start = {"HAS_POSITION": True, "BLOCK": 4096}
        report[f"start {dtype}"] = compiled(start_kernel, start, capability, dtype, 8, 3)
        report[f"silu {dtype}"] = compiled(
            silu_kernel, {"SPAN": 8, "BLOCK": 1024, "PDL": early}, capability, dtype, 4, 3
        )
        for bm, bn, warps, stages in ops.DENSE_SHAPES:
            dense = {
                "EPSILON": 1e-5,
                "COUNT": 256,
                "COUNTS": 256,
                "HAS_BIAS": False,
                "BM": bm,
                "BN": bn,
                "BK": 64,
                "PDL": early,
            }
            report[f"dense {dtype} {bm}"] = compiled(dense_kernel, dense, capability, dtype, warps, stages)
    flags = {"BLOCK": 4096, "PDL": early}
    report["peaks"] = compiled(peaks_kernel, flags, capability, "fp16", 8, 3)
    for whole, block, warps in ((True, 32768, 32), (False, 8192, 16)):
        flags = {"BLOCK": block, "WHOLE": whole, "RING": 256, "CHUNKS": 8, "PDL": early}
        report[f"draw {whole}"] = compiled(draw_kernel, flags, capability, "fp16", warps, 3)
    print(json.dumps({name: kernel.metadata.shared for name, kernel in report.items()}))


if __name__ == "__main__":
    main()
