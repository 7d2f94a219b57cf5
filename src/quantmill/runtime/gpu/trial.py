"""The decoder's own kernels beside their slow twins, on this GPU, with a model's heads, when it is opened.

A few rows of noise: positions at and around pages and parts, a long piece, one row and many.
Knows no weights. The linears have a test of their own (selftest.py).
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from quantmill.errors import UnsupportedModel
from quantmill.runtime.gpu import drawing, ops, prompts, twins
from quantmill.runtime.gpu.tensors import Gains, Heads, LayerCache, Rows
from quantmill.runtime.interface import PAGE

log = logging.getLogger(__name__)

# Three are cut into parts: a few, some, many; the last is no row.
POSITIONS = (0, 63, 64, 5 * PAGE - 1, 9 * PAGE, 20 * PAGE - 1, -1)
TILES = ((0, 20, 0, 0), (20, 16, 2 * PAGE + 3, 1))  # first row, rows, position, line of pages
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-3}
FP8_TOLERANCE = 0.06  # a value between two of float8's may go either way


def try_kernels(heads: Heads, dtype: torch.dtype, fp8: bool) -> None:
    """Raises UnsupportedModel naming a kernel that this GPU, driver or Triton does not run rightly."""
    from triton.errors import TritonError

    trials = (_rows, _tiles, _norms, _dense, _draw)
    for trial in trials:
        name = trial.__name__.strip("_")
        try:
            error = trial(_near(heads), dtype, fp8)
        except TritonError as failure:
            raise UnsupportedModel(
                f"the GPU decoder's kernels for {name} do not compile here: {failure}"
            ) from failure
        limit = FP8_TOLERANCE if fp8 else TOLERANCE[dtype]
        if not error < limit:
            raise UnsupportedModel(
                f"the GPU decoder's kernels for {name} are off by {error:.2g} on this GPU: report it"
            )


def torch_attends(heads: Heads, dtype: torch.dtype) -> bool:
    """Whether torch's attention serves prompts here; if it is off, a line of the log says so, and ours does."""
    from triton.errors import TritonError

    try:
        error = _prompt(_near(heads), dtype)
    except (RuntimeError, TritonError) as failure:  # torch may have no kernel for these heads
        log.warning("torch's attention does not serve prompts here: %s", failure)
        return False
    if not error < TOLERANCE[dtype]:
        log.warning("torch's attention is off by %.2g here, so prompts go without it: report it", error)
        return False
    return True


def _near(heads: Heads) -> Heads:
    """The same heads with a window and angles for the trial's positions."""
    angles = torch.arange(20 * PAGE, device=heads.cosines.device)[:, None] * torch.linspace(
        1, 0.01, heads.size // 2, device=heads.cosines.device
    )
    window = 3 * PAGE if heads.window else 0
    return dataclasses.replace(heads, window=window, cosines=angles.cos(), sines=angles.sin())


def _noise(heads: Heads, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(heads.cosines.device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=heads.cosines.device).to(dtype)


def _ints(heads: Heads, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=heads.cosines.device)


def _cache(heads: Heads, pages: int, dtype: torch.dtype, fp8: bool) -> LayerCache:
    shape = pages, heads.kv, PAGE, heads.size
    if not fp8:
        return LayerCache(_noise(heads, *shape, dtype=dtype), _noise(heads, *shape, dtype=dtype), None, None)
    eight = [
        (_noise(heads, *shape) * 80).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) for _ in "kv"
    ]
    scales = [(_noise(heads, *shape[:3]).abs() * 0.01 + 0.001).half() for _ in "kv"]
    return LayerCache(*eight, *scales)


def _copied(cache: LayerCache) -> LayerCache:
    scales = [None if t is None else t.clone() for t in (cache.key_scales, cache.value_scales)]
    return LayerCache(cache.keys.clone(), cache.values.clone(), *scales)


def _error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference; NaN counts as infinite."""
    errors = [float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20)) for a, b in pairs]
    return max(e if e == e else float("inf") for e in errors)


def _rows(heads: Heads, dtype: torch.dtype, fp8: bool) -> float:
    """Decoding: with the cache written on the way."""
    count, per = len(POSITIONS), 20
    numbers = _ints(heads, *range(count))
    rows = Rows(
        numbers, _ints(heads, *POSITIONS), numbers, _ints(heads, *range(count * per)).view(count, per)
    )
    qkv, cache = _noise(heads, count, heads.width, dtype=dtype), _cache(heads, count * per, dtype, fp8)
    scratch, found = ops.make_scratch(count, heads, qkv.device), []
    for module in (ops, twins):
        mine = _copied(cache)
        out = torch.zeros(count, heads.count * heads.size, dtype=dtype, device=qkv.device)
        module.attend_rows(qkv, heads, mine, rows, scratch, None, out, writes=True)
        found.append(out)
    return _error([(found[0], found[1])])


def _tiles(heads: Heads, dtype: torch.dtype, fp8: bool) -> float:
    """Prompts: the cache first, in blocks of rows and row by row, then attention."""
    count = sum(t[1] for t in TILES)
    step = ops.tile_rows(heads)
    split = [(a + i, min(step, n - i), p + i, line) for a, n, p, line in TILES for i in range(0, n, step)]
    tiles = _ints(heads, *(n for t in split for n in t)).view(-1, 4)
    pages = _ints(heads, *range(8)).view(2, 4)
    qkv, cache = _noise(heads, 256, heads.width, dtype=dtype), _cache(heads, 8, dtype, fp8)
    at = [p + i for _, n, p, _ in TILES for i in range(n)] + [-1] * (256 - count)
    lines = [line for _, n, _, line in TILES for _ in range(n)] + [0] * (256 - count)
    rows = Rows(_ints(heads, *lines), _ints(heads, *at), _ints(heads, *lines), pages)
    found = []
    for module in (ops, twins):
        mine = _copied(cache)
        out = torch.zeros(count, heads.count * heads.size, dtype=dtype, device=qkv.device)
        module.write_cache(qkv, heads, mine, rows)
        module.attend_tiles(qkv, heads, mine, tiles, pages, None, out, windowed=True)
        found.append(out)
    return _error([(found[0], found[1])])


def _prompt(heads: Heads, dtype: torch.dtype) -> float:
    """A piece that goes to torch's attention."""
    count, heads = 40, dataclasses.replace(heads, window=0)
    cache, twin = (_cache(heads, 1, dtype, False) for _ in "ab")
    if not prompts.can_attend(heads, cache, prompts.LEAST_ROWS, 0):
        return 0.0  # it will not be asked
    at = _ints(heads, *range(count))
    rows = Rows(at, at, torch.zeros_like(at), _ints(heads, 0).view(1, 1))
    qkv = _noise(heads, count, heads.width, dtype=dtype)
    wanted = torch.zeros(count, heads.count * heads.size, dtype=dtype, device=qkv.device)
    twins.write_cache(qkv, heads, twin, rows)
    tiles = _ints(heads, 0, count, 0, 0).view(1, 4)
    twins.attend_tiles(qkv, heads, twin, tiles, rows.pages, None, wanted, windowed=False)
    return _error([(prompts.attend_prompt(qkv, heads, cache, rows), wanted), (cache.keys, twin.keys)])


def _norms(heads: Heads, dtype: torch.dtype, fp8: bool) -> float:
    """Embedding, residual, norm, gather, gates."""
    width = 272
    residual, added = _noise(heads, 3, width), _noise(heads, 3, width, dtype=dtype)
    gain, gate_up = _noise(heads, width), _noise(heads, 3, 2 * width, dtype=dtype)
    order = _ints(heads, *reversed(range(width)), -1, -1)
    tokens, table = _ints(heads, 2, 0, 1), _noise(heads, 3, width, dtype=dtype)
    found = []
    for module in (ops, twins):
        first, second = residual.clone(), residual.clone()
        outs = [torch.zeros(3, n, dtype=dtype, device=gain.device) for n in (width + 2, width, width)]
        module.add_normed(first, added, gain, heads.epsilon, order, outs[0], times=2.0)
        module.embed_normed(second, table, tokens, gain, heads.epsilon, None, outs[1])
        module.gated(gate_up, 8, 0.5, outs[2])
        found.append((first, second, *outs))
    return _error(list(zip(*found, strict=True)))


def _dense(heads: Heads, dtype: torch.dtype, fp8: bool) -> float:
    """The output head, for one row and for many, behind a norm or not."""
    weight, k = _noise(heads, 200, 272, dtype=dtype), 272
    norm = Gains(_noise(heads, k), heads.epsilon, 0.25)
    pairs = []
    for rows in (1, 130):
        x, squares = _noise(heads, rows, k, dtype=dtype), _noise(heads, rows, k // 16).abs()
        for options in ({}, {"squares": squares, "norm": norm}):
            outs = [torch.zeros(rows, 200, device=x.device) for _ in "ab"]
            for module, out in zip((ops, twins), outs, strict=True):
                module.dense(x, weight, None, out, **options)
            pairs.append((outs[0], outs[1]))
    return _error(pairs)


def _draw(heads: Heads, dtype: torch.dtype, fp8: bool) -> float:
    """Greedy and not, with a vocabulary that one program holds and one that it does not: tokens, not numbers."""
    wrong = 0.0
    for vocab in (500, drawing.HELD + 100):
        logits, drawn = _noise(heads, 4, vocab), []
        for module in (drawing, twins):
            draws, positions = drawing.make_draws(4, logits.device), _ints(heads, 5, 6, 7, -1)
            rows = Rows(_ints(heads, 0, 0, 0, 0), positions, positions, positions.view(1, -1))
            draws.sharpness[1:] = 1.25
            draws.top_ks[:], draws.top_ps[:] = vocab, 0.9
            draws.top_ks[2] = 40
            draws.uniforms[:] = 0.4
            module.draw(logits, draws, rows)
            drawn.append(torch.cat([rows.tokens, rows.positions]))
        wrong += float((drawn[0] != drawn[1]).sum())
    return wrong
