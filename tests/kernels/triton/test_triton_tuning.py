"""Cuts: the rule, the table, and what fits."""

from __future__ import annotations

import pytest
import torch

from quantmill.kernels.backend import LinearSpec
from quantmill.kernels.triton import backend, packing, tune, tuning
from quantmill.kernels.triton.tuning import Cut


def tiled(k=4096, n=6144, bits=4, group=128):
    """A linear that has a shape and no memory."""
    shape = packing.tile_shape(bits, group, k)
    words = torch.empty(
        -(-k // shape.columns), shape.words, n, shape.places, dtype=torch.int16, device="meta"
    )
    return packing.TiledLinear(words, words, None, None, None, shape, k, n)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path))
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 16, 24, 32, 64, 96, 128, 192, 1024])
@pytest.mark.parametrize("k", [576, 1536, 4096, 14336])
def test_groups_begin_where_planes_or_tiles_do(bits, group, k):
    shape = packing.tile_shape(bits, group, k)
    assert shape.group % shape.places == 0
    assert shape.group % shape.columns == 0 or shape.planes % shape.group_planes == 0


def test_what_was_measured_goes_before_the_rule():
    linear = tiled()
    rule = tuning.cut_for(linear, 1)
    assert rule == tuning.cut_for(linear, 16)
    tuning.remember(
        tuning.device_name(linear.words.device), tuning.key_of(linear), 7, {16: Cut(32, 7, 2, 5, 1)}
    )
    assert tuning.cut_for(linear, 3) == Cut(32, 7, 2, 5, 1)
    assert tuning.cut_for(linear, 50).parts == 7, "the number of parts is the same for any rows"
    assert tuning.cut_for(tiled(n=4096), 1).parts != 7


def test_an_unreadable_cache_is_no_obstacle():
    path = tuning.table_path("interpreter")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert tuning.cut_for(tiled(), 1).rows in (32, 64, 128)


def test_the_shipped_table_holds_cuts_that_can_run():
    table = tuning._table("nvidia-h200")
    assert table[tuning.key_of(tiled())]["parts"] >= 1
    for entry in table.values():
        for block, (rows, warps, stages, ahead) in entry["cuts"].items():
            assert int(block) in tuning.ROWS_OF_X
            assert packing.ROWS % rows == 0
            assert warps in (1, 2, 4, 8)
            assert stages >= 1
            assert ahead & (ahead - 1) == 0


def test_fitted_stays_below_the_limit():
    shape = packing.tile_shape(3, 128, 4096)
    cut = tuning.fitted(tuning.rule_cut(128, 1), 128, shape, 95 << 10)
    assert tuning.shared_bytes(cut, 128, shape) <= 160 << 10
    assert cut.stages == 2


def test_one_number_of_parts_for_all():
    times = {
        16: {Cut(64, 1, 4, 3): 10.0, Cut(64, 2, 4, 3): 8.0, Cut(64, 4, 4, 3): 7.9},
        64: {Cut(64, 1, 4, 3): 10.0, Cut(64, 2, 4, 3): 11.0, Cut(64, 4, 4, 3): 20.0},
    }
    assert tune.fairest_parts(times) == 2
    assert all(c.parts in tune.PARTS for c in tune.candidates(tiled(), 16))


def test_a_cpu_is_refused_with_a_reason():
    spec = LinearSpec(4, 128, 64, 64, sequential=True, kept_weights=1)
    reason = backend.TRITON.supports(spec, torch.device("cpu"), torch.float16, 1)
    assert reason == "it runs on an NVIDIA GPU, the linear lies on cpu"
