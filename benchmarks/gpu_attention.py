"""Microseconds of the decoder's own kernels for Mistral's heads, by shape of program. Needs one NVIDIA GPU.

    python benchmarks/gpu_attention.py

Attention of single rows at several contexts and batches, with GB/s of keys and values; attention of a prompt beside
torch's; what runs between the linears; drawing; the output head beside cuBLAS. What a line shows to be the best
belongs into ops.py: ROW_NAMES, TILE and TILE_SHAPE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantmill.runtime.gpu import ops, tensors
from quantmill.runtime.gpu.reading import graph_ms
from quantmill.runtime.interface import PAGE

H, KV, SIZE, PAGES, LONGEST, ROUNDS, VOCAB = 32, 8, 128, 3000, 33000, 16, 32000
ROWS_CASES = ((1, 128), (1, 2048), (1, 8192), (1, 32768), (16, 128), (64, 128), (64, 2048))
ROW_NAMES = ("BLOCK", "ROW_WARPS", "LEAST", "PARTS", "ROW_REGISTERS", "POSTED")
ROW_SHAPES = (
    (128, 8, 1, 16, 0, True),
    (128, 8, 1, 16, 0, False),
    (128, 4, 1, 16, 0, True),
    (128, 8, 1, 16, 128, True),
    (128, 8, 2, 16, 0, True),
)
TILE_CASES = ((64, (4, 2)), (64, (4, 3)), (128, (8, 2)), (128, (8, 3)))
PROMPT = 2048


def noise(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def ints(values: Tensor) -> Tensor:
    return values.to(device="cuda", dtype=torch.int32)


def microseconds(call: Callable[[], object], rounds: int = 1) -> float:
    def body() -> None:
        for _ in range(rounds):
            call()

    return graph_ms(body) * 1e3 / rounds


def rows_us(heads: tensors.Heads, caches: list[tensors.LayerCache], batch: int, context: int) -> float:
    per = context // PAGE + 1
    table = ints(torch.arange(batch * per) % PAGES).view(batch, per)
    lanes = ints(torch.arange(batch))
    rows = tensors.Rows(lanes, torch.full_like(lanes, context - 1), lanes, table)
    scratch = ops.make_scratch(batch, heads, table.device)
    qkv, out = noise(batch, heads.width), noise(batch, H * SIZE)

    def all_caches() -> None:
        for cache in caches:
            ops.attend_rows(qkv, heads, cache, rows, scratch, None, out, writes=True)

    return microseconds(all_caches, ROUNDS // len(caches)) / len(caches)


def use(shape: tuple[object, ...]) -> None:
    for name, value in zip(ROW_NAMES, shape, strict=True):
        setattr(ops, name, value)


def show_rows(heads: tensors.Heads, caches: list[tensors.LayerCache]) -> None:
    before = tuple(getattr(ops, name) for name in ROW_NAMES)
    for batch, context in ROWS_CASES:
        found = []
        for shape in ROW_SHAPES:
            use(shape)
            found.append((rows_us(heads, caches, batch, context), shape))
        best = min(found)
        rate = batch * context * KV * SIZE * 4 / best[0] / 1e3
        every = ", ".join(f"{us:.1f}" for us, _ in found)
        print(
            f"rows {batch:3} context {context:6}: {best[0]:7.2f} us {rate:5.0f} GB/s by {best[1]}; all {every}"
        )
    use(before)


def show_tiles(heads: tensors.Heads, cache: tensors.LayerCache) -> None:
    qkv, out = noise(PROMPT, heads.width), noise(PROMPT, H * SIZE)
    table = ints(torch.randperm(PAGES)[: PROMPT // PAGE]).view(1, -1)
    for ops.TILE, ops.TILE_SHAPE in TILE_CASES:
        step = ops.tile_rows(heads)
        first = ints(torch.arange(0, PROMPT, step))
        tiles = torch.stack([first, torch.full_like(first, step), first, torch.zeros_like(first)], 1)
        us = microseconds(
            lambda t=tiles: ops.attend_tiles(qkv, heads, cache, t, table, None, out, windowed=False)
        )
        print(f"prompt of {PROMPT}, {ops.TILE} queries, {ops.TILE_SHAPE}: {us:.1f} us")
    q, k, v = (noise(1, n, PROMPT, SIZE) for n in (H, KV, KV))
    attend = torch.nn.functional.scaled_dot_product_attention
    print(f"   torch's own: {microseconds(lambda: attend(q, k, v, is_causal=True, enable_gqa=True)):.1f} us")
    line = ints(torch.zeros(PROMPT))
    rows = tensors.Rows(line, ints(torch.arange(PROMPT)), line, table)
    print(
        f"   keys and values cached: {microseconds(lambda: ops.write_cache(qkv, heads, cache, rows)):.1f} us"
    )


def show_others() -> None:
    residual, x = noise(PROMPT, H * SIZE, dtype=torch.float32), noise(PROMPT, H * SIZE)
    gain = torch.ones(H * SIZE, device="cuda")
    print(
        f"norm of {PROMPT} rows: {microseconds(lambda: ops.add_normed(residual, x, gain, 1e-5, None, x)):.1f} us"
    )
    gate_up, inner = noise(512, 2 * 14336), noise(512, 14336)
    print(f"gates of 512 rows: {microseconds(lambda: ops.gated(gate_up, 8, 1.0, inner)):.1f} us")
    for batch in (1, 64):
        logits, draws = noise(batch, VOCAB, dtype=torch.float32), ops.make_draws(256, gain.device)
        numbers = ints(torch.zeros(batch))
        rows = tensors.Rows(numbers, numbers.clone(), numbers, numbers.view(1, -1))
        greedy = microseconds(lambda d=draws, s=logits, r=rows: ops.draw(s, d, r))
        draws.sharpness.fill_(1.25)
        draws.top_ks.fill_(40)
        draws.top_ps.fill_(0.95)
        draws.uniforms.uniform_()
        warm = microseconds(lambda d=draws, s=logits, r=rows: ops.draw(s, d, r))
        print(f"drawing {batch:3} tokens: greedy {greedy:.1f} us, top_k 40 and top_p 0.95 {warm:.1f} us")
    weight = noise(VOCAB, H * SIZE)
    for batch in (1, 16, 64, 256):
        x, y = noise(batch, H * SIZE), noise(batch, VOCAB, dtype=torch.float32)
        mine = microseconds(lambda a=x, b=y: ops.dense(a, weight, None, b), 2)
        theirs = microseconds(lambda a=x: torch.nn.functional.linear(a, weight), 2)
        print(f"head of {batch:3} rows: {mine:.1f} us, cuBLAS {theirs:.1f} us")


def main() -> None:
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return
    frequencies = 1e4 ** (-torch.arange(SIZE // 2, device="cuda") * 2 / SIZE)
    angles = torch.arange(LONGEST, device="cuda")[:, None] * frequencies
    heads = tensors.Heads(H, KV, SIZE, 1e-5, angles.cos(), angles.sin(), None, None, 0)
    shape = PAGES, KV, PAGE, SIZE
    caches = [tensors.LayerCache(noise(*shape), noise(*shape), None, None) for _ in range(4)]
    show_rows(heads, caches)
    show_tiles(heads, caches[0])
    show_others()


if __name__ == "__main__":
    main()
