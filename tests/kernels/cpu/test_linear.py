"""Every product against its slow twin: instruction sets, bits, zero points, groups, orders, tile edges."""

from __future__ import annotations

import numpy as np
import pytest
from linears import Shape, error, inputs, int8_twin, int16_twin, random_linear, twin

from quantmill.errors import BadRequest
from quantmill.kernels.cpu.isa import ISAS, available
from quantmill.kernels.cpu.layout import Precision
from quantmill.kernels.cpu.linear import CHUNK, RunnableLinear
from quantmill.kernels.cpu.packing import pack_dense, pack_linear, pack_rounded, stack

SHAPES = (
    Shape(64, 128, 32),
    Shape(16, 64, 8, ordered=True),
    Shape(32, 96, 64, ordered=True, bias=True),
    Shape(48, 576, 128),  # the last group is short
    Shape(33, 160, -1, bias=True),  # a block of one row
    Shape(8, 224, 24, ordered=True),
    Shape(80, 512, 256),
)
TWINS = {Precision.INT8: int8_twin, Precision.INT16: int16_twin, Precision.EXACT: twin}
TILES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17)


def check(bits: int, shape: Shape, sym: bool, isa: str, precision: Precision) -> None:
    packed = random_linear(shape, bits, sym, seed=bits)
    run = RunnableLinear(pack_linear(packed), isa=isa, precision=precision, threads=2)
    for rows in TILES:
        x = inputs(rows, shape.k, rows)
        wanted = TWINS[precision](x, packed)
        assert error(run(x), wanted) < 4e-6, (rows, shape)


@pytest.mark.parametrize("isa", [isa.name for isa in ISAS])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int8_product_equals_its_slow_twin(bits: int, sym: bool, isa: str) -> None:
    if isa not in {row.name for row in available()}:
        pytest.skip(f"this processor cannot run {isa}")
    for shape in SHAPES:
        check(bits, shape, sym, isa, Precision.INT8)


@pytest.mark.parametrize(
    ("precision", "isa"),
    [
        (Precision.INT16, available()[0].name),
        (Precision.EXACT, available()[0].name),
        (Precision.EXACT, "portable"),  # the only row that reads scales by itself
    ],
)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_finer_product_equals_its_slow_twin(bits: int, sym: bool, isa: str, precision: Precision) -> None:
    for shape in SHAPES:
        check(bits, shape, sym, isa, precision)


def test_rounding_activations_costs_little() -> None:
    packed = random_linear(Shape(256, 1024, 128), 4, True)
    x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    wanted = twin(x, packed)
    for precision, loss in ((Precision.INT8, 1e-4), (Precision.INT16, 1e-9)):
        found = RunnableLinear(pack_linear(packed), precision=precision, threads=1)(x)
        assert np.square(found - wanted).mean() < loss * np.square(wanted).mean()


@pytest.mark.parametrize("precision", Precision)
def test_rows_beyond_a_chunk_and_threads_change_no_bit(precision: Precision) -> None:
    packed = random_linear(Shape(80, 96, 32), 4, True)
    x = inputs(CHUNK + 9, 96)
    one, three = (RunnableLinear(pack_linear(packed), precision=precision, threads=t) for t in (1, 3))
    assert np.array_equal(one(x), three(x))
    assert np.array_equal(one(x)[5:6], three(x[5:6]))  # nor does the size of the batch


def test_extreme_codes_and_activations_do_not_overflow() -> None:
    for isa in available():
        packed = random_linear(Shape(16, 256, 256), 8, False)
        packed.qweight.fill_(-1)  # all codes 255
        packed.qzeros.zero_()
        x = np.full((1, 256), 3.0, np.float32)
        for precision in (Precision.INT8, Precision.INT16):
            run = RunnableLinear(pack_linear(packed), isa=isa.name, precision=precision, threads=1)
            assert error(run(x), twin(x, packed)) < 1e-5, isa.name


def test_stacked_linears_give_each_its_rows() -> None:
    parts = [random_linear(Shape(n, 96, 32, bias=True), 4, True, seed=n) for n in (16, 24, 8)]
    stacked = stack([pack_linear(p) for p in parts])
    assert stacked is not None
    x = inputs(3, 96)
    found = RunnableLinear(stacked, precision=Precision.INT8, threads=2)(x)
    for part, begin in zip(parts, (0, 16, 48), strict=True):
        assert error(found[:, begin : begin + part.out_features], int8_twin(x, part)) < 4e-6


def test_linears_of_different_columns_or_bits_do_not_stack() -> None:
    plain = pack_linear(random_linear(Shape(16, 96, 32), 4, True))
    for other in (
        random_linear(Shape(16, 96, 32, ordered=True), 4, True),
        random_linear(Shape(16, 96, 32), 8, True),
        random_linear(Shape(16, 96, 64), 4, True),
        random_linear(Shape(16, 96, 32), 4, False),
    ):
        assert stack([plain, pack_linear(other)]) is None


def test_wrong_input_is_refused_with_what_is_needed() -> None:
    run = RunnableLinear(pack_linear(random_linear(Shape(16, 96, 32), 4, True)), threads=1)
    with pytest.raises(BadRequest, match=r"takes float32 \(rows, 96\)"):
        run(np.zeros((1, 95), np.float32))
    with pytest.raises(BadRequest, match="float64"):
        run(np.zeros((1, 96)))  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [64, 72])
def test_dense_and_rounded_weights(k: int) -> None:
    weight = np.random.default_rng(0).standard_normal((40, k)).astype(np.float32)
    x = inputs(9, k)
    wanted = x.astype(np.float64) @ weight.astype(np.float16).astype(np.float64).T
    for isa in (available()[0].name, "portable"):
        assert error(RunnableLinear(pack_dense(weight), isa=isa, threads=2)(x), wanted) < 2e-6
        assert (
            error(RunnableLinear(pack_rounded(weight), isa=isa, precision=Precision.EXACT)(x), wanted) < 1e-2
        )
