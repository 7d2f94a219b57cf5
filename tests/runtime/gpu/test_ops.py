"""Every kernel of the decoder beside its slow twin, at and around pages, parts, windows and tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quantmill.runtime.gpu import ops, prompts, tensors, twins
from quantmill.runtime.interface import PAGE

CONTEXT = 1600
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


def near(a: torch.Tensor, b: torch.Tensor, times: int = 1) -> bool:
    difference = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9)
    return bool(difference < TOLERANCE[a.dtype] * times)  # also false for NaN


def random(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float16, seed: int = 0
) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def make_heads(device, count=4, kv=2, size=16, window=0, norms=False) -> tensors.Heads:
    angles = torch.arange(CONTEXT)[:, None] * 1e-2 ** (torch.arange(size // 2) / size * 2)
    gains = (random(size, device=device, dtype=torch.float32) if norms else None,) * 2
    return tensors.Heads(
        count, kv, size, 1e-5, angles.cos().to(device), angles.sin().to(device), *gains, window
    )


def make_cache(heads: tensors.Heads, pages: int, device, fp8: bool = False) -> tensors.LayerCache:
    """Full of numbers, those of places that nobody has written NaN."""
    shape = (pages, heads.kv, PAGE, heads.size)
    if fp8:
        scales = (
            torch.rand(2, pages, heads.kv, PAGE, generator=torch.Generator().manual_seed(3)) * 0.01 + 0.001
        )
        eight = (
            (random(2, *shape, device=device, dtype=torch.float32) * 80)
            .clamp(-448, 448)
            .to(torch.float8_e4m3fn)
        )
        return tensors.LayerCache(*eight.view(torch.uint8), *scales.half().to(device))
    return tensors.LayerCache(*random(2, *shape, device=device), None, None)


def make_rows(positions: list[int], sequences: list[int], device) -> tensors.Rows:
    """Every sequence has pages of its own, scattered."""
    most = CONTEXT // PAGE
    count = max(sequences) + 1
    pages = torch.randperm(count * most, generator=torch.Generator().manual_seed(5)).view(count, most)
    numbers = (torch.tensor(x, dtype=torch.int32, device=device) for x in (positions, positions, sequences))
    return tensors.Rows(*numbers, pages.int().to(device))


def copied(cache: tensors.LayerCache) -> tensors.LayerCache:
    return tensors.LayerCache(*(None if t is None else t.clone() for t in dataclasses.astuple(cache)))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("width", [64, 72])
def test_add_normed(device, width, ordered):
    residual, added = random(3, width, device=device, dtype=torch.float32), random(3, width, device=device)
    gain = random(width, device=device, dtype=torch.float32, seed=1)
    order = torch.randperm(width, device=device, dtype=torch.int32) if ordered else None
    if order is not None:
        order = torch.cat([order[:20], torch.full((8,), -1, dtype=torch.int32, device=device), order[20:]])
    outs = [
        torch.full((3, width + 8 * ordered), float("nan"), dtype=torch.float16, device=device) for _ in "ab"
    ]
    residuals = [residual.clone(), residual.clone()]
    for module, out, mine in zip((ops, twins), outs, residuals, strict=True):
        module.add_normed(mine, added, gain, 1e-5, order, out)
    assert near(*residuals)
    assert near(*outs)


def test_embed_normed(device):
    embedding, gain = random(50, 64, device=device), random(64, device=device, dtype=torch.float32, seed=1)
    tokens = torch.tensor([0, 49, 7], dtype=torch.int32, device=device)
    found = []
    for module in (ops, twins):
        residual = torch.full((3, 64), float("nan"), device=device)
        out = torch.empty(3, 64, dtype=torch.float16, device=device)
        module.embed_normed(residual, embedding, tokens, gain, 1e-5, None, out)
        found.append((residual, out))
    assert torch.equal(found[0][0], found[1][0])
    assert near(found[0][1], found[1][1])


@pytest.mark.parametrize("span", [8, 96])
def test_gated_keeps_large_products_within_fp16(device, span):
    gate_up = random(3, 2 * 96, device=device) * 1000
    found = [torch.empty(3, 96, dtype=torch.float16, device=device) for _ in "ab"]
    for module, out in zip((ops, twins), found, strict=True):
        module.gated(gate_up, span, 1 / 256, out)
    assert torch.isfinite(found[0]).all()
    assert (found[0].float() * 256).max() > 65504
    assert near(*found)


@pytest.mark.parametrize(("fp8", "norms", "count"), [(False, False, 5), (True, True, 5), (True, False, 300)])
def test_write_cache(device, fp8, norms, count):
    heads = make_heads(device, norms=norms)
    others = list(range(100, 100 + count - 5))
    rows = make_rows([0, 63, -1, 64, 700, *others], [0, 1, 2, 3, 3] + [0] * len(others), device)
    qkv, start = (
        random(count, heads.width, device=device),
        make_cache(heads, 4 * CONTEXT // PAGE, device, fp8),
    )
    caches = [copied(start), copied(start)]
    for module, cache in zip((ops, twins), caches, strict=True):
        module.write_cache(qkv, heads, cache, rows)
    for mine, wanted, before in zip(*(dataclasses.astuple(c) for c in (*caches, start)), strict=True):
        if mine is None:
            continue
        if mine.dtype == torch.uint8:  # a value between two of float8's may go either way
            mine, wanted = (t.view(torch.float8_e4m3fn).float() for t in (mine, wanted))
            assert (mine - wanted).norm() / wanted.norm() < 5e-2
        else:
            assert near(mine, wanted)
            assert not torch.equal(mine, before)


@pytest.mark.parametrize(
    ("count", "kv", "size", "window", "fp8", "norms", "writes", "posted"),
    [
        (4, 2, 16, 0, False, False, True, False),
        (4, 2, 16, 0, False, False, True, True),
        (4, 2, 16, 100, False, False, False, False),
        (6, 2, 24, 0, True, True, True, False),  # a group and a size that are no powers of two
        (6, 2, 24, 0, True, True, True, True),
        (8, 2, 128, 0, False, False, True, True),
        (4, 2, 128, 900, False, False, True, True),
        (4, 4, 16, 1, False, True, True, False),
    ],
)
def test_attend_rows(device, count, kv, size, window, fp8, norms, writes, posted, monkeypatch):
    """However the parts of a text are added up: by who comes last, or by those who wait for the others' words."""
    if posted and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0)):
        pytest.skip("parts are posted on 9.0; the interpreter runs one program after the other")
    monkeypatch.setattr(ops, "POSTED", posted)
    heads = make_heads(device, count, kv, size, window, norms)
    positions = [0, 62, 63, 64, -1, 255, 256, 300, 700, 1100, CONTEXT - 1]
    rows = make_rows(positions, list(range(len(positions))), device)
    qkv = random(len(positions), heads.width, device=device)
    start = make_cache(heads, len(positions) * CONTEXT // PAGE, device, fp8)
    scratch, found = ops.make_scratch(len(positions), heads, device), []
    for module in (ops, twins):
        cache, out = (
            copied(start),
            torch.zeros(len(positions), count * size, dtype=torch.float16, device=device),
        )
        if not writes:
            module.write_cache(qkv, heads, cache, rows)
        module.attend_rows(qkv, heads, cache, rows, scratch, None, out, writes=writes)
        found.append(out)
    assert near(*found, times=8 if fp8 else 1)  # a value between two of float8's may go either way
    parted = [[int(posted and p >= ops.BLOCK * ops.LEAST)] * kv for p in positions]
    assert window or scratch.turns.tolist() == parted


def test_a_rows_bits_do_not_depend_on_the_others(device):
    heads = make_heads(device)
    rows = make_rows([700, 20, 300], [0, 1, 2], device)
    qkv, cache = random(3, heads.width, device=device), make_cache(heads, 3 * CONTEXT // PAGE, device)
    together = torch.zeros(3, 64, dtype=torch.float16, device=device)
    scratch = ops.make_scratch(3, heads, device)
    ops.attend_rows(qkv, heads, cache, rows, scratch, None, together, writes=True)
    for i in range(3):
        alone, one = torch.zeros(1, 64, dtype=torch.float16, device=device), slice(i, i + 1)
        row = tensors.Rows(rows.tokens[one], rows.positions[one], rows.sequences[one], rows.pages)
        ops.attend_rows(qkv[one].clone(), heads, cache, row, scratch, None, alone, writes=True)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("window", "fp8"), [(0, False), (100, False), (0, True)])
def test_attend_tiles(device, window, fp8, ordered):
    heads = make_heads(device, 6, 2, 24, window, True)
    tiles = torch.tensor(
        [[0, 21, 0, 0], [21, 3, 21, 0], [24, 21, 120, 1], [45, 1, 500, 2]], dtype=torch.int32, device=device
    )
    assert int(tiles[:, 1].max()) <= ops.tile_rows(heads)
    pages = make_rows([0] * 3, [0, 1, 2], device).pages
    qkv, cache = random(46, heads.width, device=device), make_cache(heads, 3 * CONTEXT // PAGE, device, fp8)
    places_of = torch.randperm(144, device=device, dtype=torch.int32) if ordered else None
    found = []
    for module in (ops, twins):
        out = torch.full((46, 144), float("nan"), dtype=torch.float16, device=device)
        module.attend_tiles(qkv, heads, cache, tiles, pages, places_of, out, windowed=True)
        found.append(out)
    assert near(*found)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("count", [1, 90, 256])
def test_attend_prompt(device, count, norms):
    """Torch's attention behind `turn` gives what the tile kernel's twin gives; the cache is filled alike."""
    heads = make_heads(device, 6, 2, 24, norms=norms)
    rows = make_rows(list(range(count)), [0] * count, device)
    qkv, before = random(count, heads.width, device=device), make_cache(heads, CONTEXT // PAGE, device)
    caches = [copied(before), copied(before)]
    mine = prompts.attend_prompt(qkv, heads, caches[0], rows)
    wanted = torch.empty(count, 144, dtype=torch.float16, device=device)
    tiles = torch.tensor([[0, count, 0, 0]], dtype=torch.int32, device=device)
    twins.write_cache(qkv, heads, caches[1], rows)
    twins.attend_tiles(qkv, heads, caches[1], tiles, rows.pages, None, wanted, windowed=False)
    assert near(mine, wanted)
    assert near(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)


def test_what_torchs_attention_does_not_know(device):
    heads = make_heads(device)
    cache, eight = make_cache(heads, 1, device), make_cache(heads, 1, device, fp8=True)
    on_cpu = device.type == "cpu" or torch.cuda.get_device_capability(device) >= prompts.FROM
    assert prompts.can_attend(heads, cache, prompts.LEAST_ROWS, 0) == on_cpu
    assert not prompts.can_attend(heads, cache, prompts.LEAST_ROWS - 1, 0)
    assert not prompts.can_attend(heads, cache, prompts.LEAST_ROWS, 1)
    assert not prompts.can_attend(heads, eight, prompts.LEAST_ROWS, 0)
    windowed = dataclasses.replace(heads, window=prompts.LEAST_ROWS - 1)
    assert not prompts.can_attend(windowed, cache, prompts.LEAST_ROWS, 0)


@pytest.mark.parametrize("ordered", [False, True])
def test_start_and_a_norm_behind_it(device, ordered):
    """What `start` leaves and `dense` makes of it is the norm and the product."""
    embedding, weight = random(50, 96, device=device), random(70, 96, device=device, seed=1)
    norm = tensors.Gains(random(96, device=device, dtype=torch.float32, seed=2), 1e-5, 1 / 16)
    tokens = torch.tensor([3, 49, 0], dtype=torch.int32, device=device)
    position = torch.randperm(96, device=device, dtype=torch.int32) if ordered else None
    found = []
    for module in (ops, twins):
        residual, squares = torch.empty(3, 96, device=device), torch.empty(3, 6, device=device)
        after, y = torch.zeros(3, 96, dtype=torch.float16, device=device), torch.empty(3, 70, device=device)
        module.start(residual, embedding, tokens, norm, position, after, squares)
        module.dense(after, weight, None, y, squares=squares, norm=norm)
        found.append((residual, squares, after, y))
    for mine, wanted in zip(*found, strict=True):
        assert (mine.float() - wanted.float()).norm() / wanted.float().norm() < 1e-3
    if not ordered:
        normed = torch.nn.functional.rms_norm(embedding[tokens.long()].float(), (96,), norm.gain, 1e-5)
        assert (found[0][3] - normed @ weight.float().T).norm() / found[0][3].norm() < 2e-3


@pytest.mark.parametrize("shape", [(1, 64, 64), (17, 72, 65), (70, 200, 130)])
def test_dense(device, shape):
    m, k, n = shape
    x, weight = random(m, k, device=device), random(n, k, device=device, seed=1)
    bias = random(n, device=device, dtype=torch.float32)
    found = [torch.full((m, n), float("nan"), device=device) for _ in "ab"]
    for module, out in zip((ops, twins), found, strict=True):
        module.dense(x, weight, bias, out)
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-3
    one = torch.empty(1, n, device=device)
    ops.dense(x[-1:], weight, bias, one)
    assert torch.equal(one[0], found[0][-1])
