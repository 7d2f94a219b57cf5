"""Hidden states come back as they were put: exactly on a CPU, to float16 with any range on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantmill.quantize.states import States, halve

ON_GPU = torch.cuda.is_available()


def batches() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 8, generator=g), 1e6 * torch.randn(2, 5, 8, generator=g), torch.zeros(1, 5, 8)]


def test_a_cpu_keeps_them_as_they_are() -> None:
    given = batches()
    states = States(given, torch.device("cpu"))
    assert len(states) == 3
    assert states.rows == 5
    assert states.shapes == [(2, 5), (2, 5), (1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(states, given, strict=True))
    states[1] = given[0]
    assert torch.equal(states[1], given[0])
    states.release()
    assert states.rows == 5


@pytest.mark.parametrize("batch", batches())
def test_halves_keep_eleven_bits_of_any_range(batch: torch.Tensor) -> None:
    value, scale = halve(batch)
    assert value.dtype == torch.float16
    assert torch.isfinite(value).all()
    assert torch.log2(scale) == torch.log2(scale).round(), "a power of two loses nothing"
    assert torch.allclose(value.float() * scale, batch, rtol=2**-11, atol=float(batch.abs().max()) * 2**-24)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU that torch can use")
@pytest.mark.parametrize("on_host", [False, True])
def test_a_gpu_gives_back_what_was_put(on_host: bool) -> None:
    given = [b.cuda() for b in batches()]
    states = States(given, torch.device("cuda"), on_host=on_host)
    for _ in range(3):  # written while the next one is being fetched
        for i, batch in enumerate(states):
            assert torch.allclose(batch, given[i], rtol=2**-11, atol=float(given[i].abs().max()) * 2**-23)
            given[i] = batch * 0.5 + 1
            states[i] = given[i]
