"""Memory: the fastest way that fits is taken, less memory means a more frugal one, too little is refused."""

from __future__ import annotations

import pytest

from quantize.test_plan import MISTRAL_7B
from quantmill.errors import BadRequest
from quantmill.hub.variants import CARD_GRID
from quantmill.quantize.memory import (
    GPU_BASE,
    RESIDENCES,
    choose,
    cpu_bytes,
    gpu_bytes,
    gpu_peak,
    host_bytes,
    lane_tokens,
    load_of,
    states_bytes,
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
    two = load(paired=(True, True, False, False))
    assert gpu_bytes(two, RESIDENCES[0]) > 1.5 * gpu_bytes(load(), RESIDENCES[0])
    assert two.tokens == (262144, 262144, 32768, 32768)
    assert two.originals == 2 * 262144


def test_preset_best_fits_16_gb_of_gpu_and_12_gb_of_host_memory() -> None:
    one = load_of(MISTRAL_7B, CARD_GRID[:1], 128, 2048, "cuda", (True,))
    way = choose(one, "cuda", vram=16 * GB, ram=12 * GB)
    assert not way.waiting
    assert host_bytes(one, way) <= 12 * GB


def test_a_way_of_preset_best_that_ran_out_of_memory_is_not_taken_again() -> None:
    """In 16 GB, one variant started again for each group did not fit on an H200; 14.55 GB were planned."""
    one = load_of(MISTRAL_7B, CARD_GRID[:1], 128, 2048, "cuda", (True,))
    assert gpu_peak(one, RESIDENCES[1]) > 16 * GB
    assert choose(one, "cuda", vram=16 * GB, ram=12 * GB).name == "host"


def test_four_branches_of_preset_best_share_their_states_between_gpu_and_host() -> None:
    four = load_of(MISTRAL_7B, CARD_GRID, 128, 2048, "cuda", [v.config.bits < 8 for v in CARD_GRID])
    way = choose(four, "cuda", vram=20 * GB, ram=12 * GB)
    assert way.name == "shared"
    on_gpu, on_host = states_bytes(four, way)
    assert on_gpu == 2 * 4096 * sum(four.tokens)
    assert on_host == 2 * 4096 * four.originals
    assert sum(states_bytes(four, RESIDENCES[1])) == states_bytes(four, RESIDENCES[-1])[1]


MEASURED = (  # benchmarks/gpu_quantize.py on one H200: variants, preset best, the way, bytes that tensors took
    (1, False, "resident", 46.01e9),
    (4, False, "resident", 48.71e9),
    (1, False, "rerun", 10.58e9),
    (1, True, "resident", 95.21e9),
    (4, True, "resident", 100.84e9),
)


@pytest.mark.parametrize(("variants", "best", "name", "taken"), MEASURED)
def test_what_was_measured_is_predicted_within_a_tenth(
    variants: int, best: bool, name: str, taken: float
) -> None:
    chosen = CARD_GRID[:variants]
    paired = [best and v.config.bits < 8 for v in chosen]
    way = next(r for r in RESIDENCES if r.name == name)
    predicted = gpu_bytes(load_of(MISTRAL_7B, chosen, 128, 2048, "cuda", paired), way)
    assert predicted == pytest.approx(taken + GPU_BASE, rel=0.1)


WHOLE = (  # benchmarks/gpu_quantize_whole.py on one H200: variants, preset best, GB allowed, what the process held
    (4, False, 139, 54.20e9),
    (4, True, 139, 106.54e9),
    (1, False, 16, 11.85e9),
)


@pytest.mark.parametrize(("variants", "best", "vram", "held"), WHOLE)
def test_what_a_whole_process_held_is_predicted_within_a_twentieth(
    variants: int, best: bool, vram: int, held: float
) -> None:
    chosen = CARD_GRID[:variants]
    paired = [best and v.config.bits < 8 for v in chosen]
    sizes = load_of(MISTRAL_7B, chosen, 128, 2048, "cuda", paired)
    way = choose(sizes, "cuda", vram=vram * GB, ram=None)
    assert gpu_peak(sizes, way) == pytest.approx(held, rel=0.05)
    assert host_bytes(sizes, way) == pytest.approx(4.2e9, rel=0.1), "3.83, 4.32, 4.22 GB were resident"


def test_groups_are_what_is_solved_as_one() -> None:
    assert load().groups == ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    assert load().weights == 218_103_808
    assert load().tokens == (262144, 262144, 32768, 32768)


def test_a_batch_is_whole_rows() -> None:
    assert lane_tokens("cuda", 2048) == 16384
    assert lane_tokens("cuda", 3000) == 15000
    assert lane_tokens("cuda", 32768) == 32768
