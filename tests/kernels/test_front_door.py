"""Which backend is chosen, what is said about it, and that every way in gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from gptq_models import exact_weight, random_linear
from quantmill.errors import BadRequest
from quantmill.formats.gptq import pack
from quantmill.kernels import backend as rows
from quantmill.kernels import front_door as kernels
from quantmill.kernels import memory, reference
from quantmill.types import QuantConfig

CPU = torch.device("cpu")
FP32 = torch.float32
MISTRAL_7B = 6_979_321_856


def make(shuffled: bool = False):
    config = QuantConfig(group_size=32)
    linear = random_linear(96, 64, config, shuffled=shuffled)
    return exact_weight(linear).float(), pack(linear, config, torch.randn(64).half())


def spec(kept: int) -> kernels.LinearSpec:
    return kernels.LinearSpec(4, 128, 4096, 4096, sequential=True, kept_weights=kept)


@pytest.fixture
def free(monkeypatch):
    """Set what the machine has free."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(reference, "free_bytes", lambda device: size)

    return set_free


@pytest.fixture
def only_slow_rows(monkeypatch):
    """The table as it is without the fast kernels, which have tests of their own."""
    monkeypatch.setattr(kernels, "BACKENDS", (kernels.DENSE, kernels.REFERENCE))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 3, 96), (0, 96)])
def test_matmul_takes_any_leading_shape(shape):
    weight, packed = make()
    x = torch.randn(shape)
    y = kernels.matmul(x, packed, backend="reference")
    assert y.shape == (*shape[:-1], 64)
    torch.testing.assert_close(y, x @ weight.T + packed.bias.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "reference"])
def test_prepared_layer_gives_the_same(name):
    weight, packed = make(shuffled=True)
    ready = kernels.prepare(packed, FP32, backend=name)
    assert {row.name for _, row, _ in ready.steps} == {name}
    x = torch.randn(2, 3, 96)
    torch.testing.assert_close(ready(x), x @ weight.T + packed.bias.float(), rtol=1e-5, atol=1e-5)


def test_prepared_layer_refuses_other_inputs():
    _, packed = make()
    ready = kernels.prepare(packed, FP32, backend="reference")
    with pytest.raises(BadRequest, match=r"ready for torch\.float32 with 96"):
        ready(torch.randn(2, 96).half())
    with pytest.raises(BadRequest, match="95 columns"):
        ready(torch.randn(2, 95))


def test_spec_tells_act_order():
    assert kernels.spec_of(make()[1]).sequential
    assert not kernels.spec_of(make(shuffled=True)[1]).sequential


@pytest.mark.usefixtures("only_slow_rows")
class TestDense:
    def test_small_models_are_kept_dense(self, free):
        free(2 << 30)
        assert "dense on cpu, float32, 1 rows" in kernels.explain(spec(100_000_000), CPU, FP32, 1)

    def test_not_beyond_a_quarter_of_free_memory(self, free):
        free(1 << 30)
        said = kernels.explain(spec(100_000_000), CPU, FP32, 1)
        assert said.startswith("reference on cpu")
        assert "not dense: dense weights take 0.40 GB, the limit is 0.27 GB" in said

    def test_never_beyond_four_gigabytes(self, free):
        free(1 << 40)
        said = kernels.explain(spec(MISTRAL_7B), CPU, torch.bfloat16, 1)
        assert said.startswith("reference")
        assert "13.96 GB, the limit is 4.29 GB" in said

    def test_float16_on_a_cpu_counts_as_float32(self, free):
        free(1 << 30)
        assert kernels.plan(spec(60_000_000), CPU, torch.bfloat16)[0][1] is kernels.DENSE
        assert kernels.plan(spec(70_000_000), CPU, torch.float16)[0][1] is kernels.REFERENCE

    def test_not_for_a_single_call(self, free):
        free(1 << 40)
        assert "pays only where the layer is kept" in kernels.explain(spec(0), CPU, FP32, 1)

    def test_one_backend_is_one_step(self, free):
        free(1 << 40)
        assert kernels.plan(spec(1000), CPU, FP32) == ((kernels.ROW_BRACKETS[-1], kernels.DENSE),)


def test_rows_choose_the_backend(monkeypatch):
    """A row that serves small calls only shares a layer with the next one, each prepared once."""
    made = []

    def few_rows(spec, device, dtype, rows):
        return None if rows <= 16 else "it takes 16 rows at most"

    def note(packed, dtype):
        made.append(packed)
        return packed

    few = kernels.Backend(
        "few", "for decoding", few_rows, note, lambda x, state: x.new_full((x.shape[0], 64), 7)
    )
    monkeypatch.setattr(kernels, "BACKENDS", (few, kernels.REFERENCE))
    _, packed = make()
    ready = kernels.prepare(packed, FP32)
    assert [(most, row.name) for most, row, _ in ready.steps] == [(16, "few"), (1 << 20, "reference")]
    assert len(made) == 1
    assert (ready(torch.randn(16, 96)) == 7).all()
    assert (ready(torch.randn(17, 96)) != 7).any()
    assert "not few: it takes 16 rows at most" in kernels.explain(kernels.spec_of(packed), CPU, FP32, 17)


def test_errors_list_the_rows_and_their_reasons():
    _, packed = make()
    with pytest.raises(BadRequest, match=r"no backend is called 'magic'; there are .*dense, reference"):
        kernels.matmul(torch.randn(1, 96), packed, backend="magic")
    with pytest.raises(BadRequest, match=r"reference: activations are torch.int32.*use float16"):
        kernels.matmul(torch.ones(1, 96, dtype=torch.int32), packed, backend="reference")


def test_free_memory_heeds_a_container(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert rows.free_bytes(CPU) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert rows.free_bytes(CPU) > 3000
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert rows.free_bytes(CPU) > 3000
