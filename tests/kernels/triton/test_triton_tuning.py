"""Cuts: the rule, the table, and what fits."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from quantmill.kernels.backend import LinearSpec
from quantmill.kernels.triton import backend, packing, tune, tuning
from quantmill.kernels.triton.tuning import Cut, WideCut


def tiled(k=4096, n=6144, bits=4, group=128):
    """A linear that has a shape and no memory."""
    shape = packing.tile_shape(bits, group, k)
    units, tiles = -(-k // shape.columns), -(-n // packing.ROWS) * 8
    words = torch.empty(tiles, units, shape.words, 32, 4, dtype=torch.int32, device="meta")
    scales = torch.empty(tiles, -(-units * shape.columns // shape.group), 8, dtype=torch.int32, device="meta")
    return packing.TiledLinear(words, scales, None, None, None, shape, k, n)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path))
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 16, 24, 32, 64, 96, 128, 192, 1024])
@pytest.mark.parametrize("k", [576, 1536, 4096, 14336])
def test_groups_begin_where_planes_do(bits, group, k):
    shape = packing.tile_shape(bits, group, k)
    assert shape.group % (16 if shape.narrow else 32) == 0
    assert shape.group % shape.columns == 0 or shape.columns % shape.group == 0


def test_what_was_measured_goes_before_the_rule():
    linear = tiled()
    rule = tuning.cut_for(linear, 1)
    assert rule == tuning.cut_for(linear, 2)
    one, wide = Cut(8, 4, 2, 1, 1, 5, 1, False, False), WideCut(128, 8, 2, 4)
    name = tuning.device_name(linear.words.device)
    tuning.remember(name, tuning.key_of(linear), {2: one}, {128: wide, 256: None})
    assert tuning.cut_for(linear, 1) == one
    for rows in (7, 16, 50):
        cut = tuning.cut_for(linear, rows)
        assert (cut.slices, cut.parts) == (4, 2), "the same sums for any number of rows"
    assert tuning.wide_cut(linear, 100) == wide
    assert tuning.wide_cut(linear, 200) is None
    assert tuning.cut_for(tiled(n=4096), 1).slices != 4


def test_what_the_kernel_for_many_rows_takes():
    for linear in (tiled(), tiled(bits=2), tiled(bits=3), tiled(k=576, n=192), tiled(group=-1)):
        for rows in (17, 100, 256, 1000):
            check_wide(linear, tuning.wide_cut(linear, rows))
        assert tuning.wide_cut(linear, tuning.MOST_WIDE[linear.shape.bits] + 1) is None
    assert tuning.wide_cut(tiled(group=16), 256) is None
    assert tuning.wide_cut(tiled(n=4095), 256) is None, "the copy engine cannot write its rows"


@pytest.mark.parametrize("rows", [17, 64, 300, 2048, 5000])
def test_shares_cover_all_tiles(monkeypatch, rows):
    """Of programs that stay, whole tiles are whole rounds, and no more is shared than must be."""
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    for linear in (tiled(), tiled(k=576, n=192), tiled(n=28672)):
        for cut in tune.wide_candidates(linear, rows):
            share = tuning.shares(linear, rows, cut)
            turns = -(-linear.columns // tuning.TURN)
            assert share.tiles == linear.rows // (16 * cut.warps * cut.tiles) * -(-rows // cut.rows)
            assert share.shared <= min(share.tiles, tuning.MOST_SHARED)
            assert share.programs <= (share.shared or share.tiles) * turns, "no program is without a turn"
            if cut.stay > 0:
                assert (share.tiles - share.shared) % share.programs == 0
                assert share.programs <= 132 * cut.stay
            else:
                assert share.programs == share.tiles * cut.parts


@pytest.mark.parametrize(
    ("asked", "rows"), [("", 32), ("64", 64), ("1000", 1000), ("all", sys.maxsize), ("many", 32)]
)
def test_rows_with_the_same_bits_alone_and_together(monkeypatch, asked, rows):
    monkeypatch.setenv(tuning.SAME_BITS, asked)
    known = tuning.same_bits_up_to, tuning.same_bits_everywhere
    for f in known:
        f.cache_clear()
    assert tuning.same_bits_up_to() == rows
    assert tuning.same_bits_everywhere() == (asked == "all")
    for f in known:
        f.cache_clear()


def check_wide(linear, cut):
    """Its programs share the rows of weights out, and every part has a turn."""
    assert linear.rows % (packing.TILE * cut.warps * cut.tiles) == 0
    assert cut.parts <= -(-linear.columns // tuning.TURN)
    assert 1 <= cut.open <= cut.pieces * cut.tiles
    assert cut.parts == 1 or cut.stay <= 0
    assert cut.rows * cut.tiles <= 256, "a thread's registers hold the sums"


def test_an_unreadable_cache_is_no_obstacle():
    path = tuning.table_path("interpreter")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert tuning.cut_for(tiled(), 1).slices == 8


def check_cut(linear, block, cut):
    """A program's share divides the work, and its warps are a power of two."""
    warps = (1 if cut.in_turn else cut.slices // (cut.parts if cut.split else 1)) * cut.beside
    assert warps in (1, 2, 4, 8, 16)
    assert (linear.rows // packing.TILE) % (cut.beside * cut.tiles) == 0
    assert cut.slices % cut.parts == 0
    assert cut.rows == max(8, block)
    assert cut.tiles * cut.rows <= 64, "a thread's registers hold the sums"
    assert cut.ahead >= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "n"), [(576, 576), (576, 192), (1536, 576), (4096, 6144), (14336, 4096)])
def test_rules_and_candidates_can_run(bits, k, n):
    linear = tiled(k, n, bits)
    for block in tuning.ROWS_OF_X:
        check_cut(linear, block, tuning.cut_for(linear, block))
        for cut in tune.candidates(linear, block):
            check_cut(linear, block, cut)
    for rows in tuning.WIDE_ROWS:
        for wide in tune.wide_candidates(linear, rows):
            check_wide(linear, wide)
        check_wide(linear, tuning.rule_wide(linear, rows))


def test_the_shipped_table_holds_cuts_that_can_run():
    table = tuning._table("nvidia-h200")
    assert tuning.key_of(tiled()) in table
    for key, entry in table.items():
        bits, group, k, n = re.fullmatch(r"(\d)b-(-?\d+)gz?-(\d+)x(\d+)", key).groups()
        linear = tiled(int(k), int(n), int(bits), int(group))
        for block, rest in entry["cuts"].items():
            assert int(block) in tuning.ROWS_OF_X
            check_cut(linear, int(block), Cut(max(8, int(block)), entry["slices"], entry["parts"], *rest))
        for rows, wide in entry.get("wide", {}).items():
            assert int(rows) in tuning.WIDE_ROWS
            if wide is not None:
                check_wide(linear, WideCut(*wide))


def test_one_number_of_parts_for_all():
    def cut(parts):
        return Cut(8, 8, parts, 1, 1, 4, 4, False, False)

    times = {
        2: {cut(1): 10.0, cut(2): 8.0, cut(4): 7.9},
        16: {cut(1): 10.0, cut(2): 11.0, cut(4): 20.0},
    }
    assert tune.fairest_parts(times) == 2


def test_a_cpu_is_refused_with_a_reason():
    spec = LinearSpec(4, 128, 64, 64, sequential=True, kept_weights=1)
    reason = backend.TRITON.supports(spec, torch.device("cpu"), torch.float16, 1)
    assert reason == "it runs on an NVIDIA GPU, the linear lies on cpu"
