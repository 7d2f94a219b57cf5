"""Memory: the fastest way that fits is taken, less memory means a more frugal one, too little is refused."""

from __future__ import annotations

import pytest

from quantize.test_plan import MISTRAL_7B
from quantmill.errors import BadRequest
from quantmill.hub.variants import CARD_GRID
from quantmill.quantize.memory import (
    RESIDENCES,
    choose,
    cpu_bytes,
    gpu_bytes,
    host_bytes,
    lane_tokens,
    load_of,
)

GB = 10**9


def load(device: str = "cuda", samples: int = 128, **more):
    return load_of(MISTRAL_7B, CARD_GRID, samples, 2048, device, **more)


def test_more_memory_is_faster() -> None:
    chosen = [choose(load(), "cuda", vram=vram * GB, ram=None).name for vram in (139, 80, 16, 12)]
    assert chosen == ["resident", "resident", "rerun", "host"]


def test_a_7b_model_fits_16_gb_of_gpu_and_12_gb_of_host_memory() -> None:
    way = choose(load(), "cuda", vram=16 * GB, ram=12 * GB)
    assert gpu_bytes(load(), way) <= 16 * GB
    assert host_bytes(load(), way) <= 12 * GB


def test_each_way_takes_less_than_the_one_before() -> None:
    assert sorted((gpu_bytes(load(), r) for r in RESIDENCES), reverse=True) == [
        gpu_bytes(load(), r) for r in RESIDENCES
    ]
    on_cpu = load("cpu")
    assert cpu_bytes(on_cpu, RESIDENCES[1]) < cpu_bytes(on_cpu, RESIDENCES[0])
    assert choose(on_cpu, "cpu", vram=None, ram=cpu_bytes(on_cpu, RESIDENCES[1])).name == "rerun"


def test_too_little_is_refused_with_what_it_takes() -> None:
    with pytest.raises(BadRequest, match=r"GB of GPU and .* GB of host memory; there is 4\.0 GB --max-vram"):
        choose(load(), "cuda", vram=4 * GB, ram=None)
    with pytest.raises(BadRequest, match=r"this run needs .* GB; there is 0\.1 GB --max-ram"):
        choose(load("cpu"), "cpu", vram=None, ram=GB // 10)


def test_two_streams_take_more() -> None:
    assert gpu_bytes(load(two_streams=True), RESIDENCES[0]) > 1.5 * gpu_bytes(load(), RESIDENCES[0])


def test_groups_are_what_is_solved_as_one() -> None:
    assert load().groups == ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    assert load().weights == 218_103_808
    assert load().tokens == (262144, 262144, 32768, 32768)


def test_a_batch_is_whole_rows() -> None:
    assert lane_tokens("cuda", 2048) == 16384
    assert lane_tokens("cuda", 3000) == 15000
    assert lane_tokens("cuda", 32768) == 32768
