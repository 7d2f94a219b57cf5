"""GPTQ words into lines: the order of columns, and every code found again where dots.py looks for it."""

from __future__ import annotations

import numpy as np
import pytest
from linears import Shape, random_linear
from numpy.typing import NDArray

from quantmill.formats.gptq import unpack
from quantmill.kernels.cpu.layout import CpuLinear, aligned
from quantmill.kernels.cpu.packing import lay_columns, pack_linear


def codes_of(linear: CpuLinear) -> NDArray[np.uint8]:
    """(blocks * 16, slices * 32) codes, read byte by byte as the description of the layout says."""
    blocks, slices, bits, _ = linear.weights.shape
    lines = linear.weights.reshape(blocks, slices, bits, 16, 4)  # ..., row, byte
    words = np.zeros((blocks, slices, 8, 16, 4), np.uint8)
    for j in range(8):
        if bits == 8:
            words[:, :, j] = lines[:, :, j]
        elif bits == 4:
            words[:, :, j] = lines[:, :, j // 2] >> 4 * (j % 2) & 15
        else:
            words[:, :, j] = lines[:, :, j // 4] >> 2 * (j % 4) & 3
        if bits == 3:
            words[:, :, j] |= (lines[:, :, 2] >> j & 1) << 2
    return words.transpose(0, 3, 1, 2, 4).reshape(blocks * 16, slices * 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "shape", [Shape(32, 64, 32), Shape(40, 96, 64, ordered=True), Shape(8, 168, 40), Shape(24, 72, -1)]
)
def test_every_code_lies_where_the_layout_says(bits: int, shape: Shape) -> None:
    packed = random_linear(shape, bits, sym=False)
    solved, linear = unpack(packed), pack_linear(packed)
    columns, first_slice = lay_columns(packed.g_idx.numpy(), packed.scales.shape[0])
    assert (linear.columns is None) == np.array_equal(columns, np.arange(shape.k))
    codes, present = codes_of(linear), columns >= 0
    assert np.array_equal(codes[: shape.n, present], solved.codes.numpy()[:, columns[present]])
    assert not codes[:, ~present].any()
    assert np.array_equal(first_slice, linear.first_slice)
    scales = linear.scales.transpose(0, 2, 1).reshape(-1, packed.scales.shape[0])
    assert np.array_equal(scales[: shape.n], solved.scales.numpy())
    assert linear.zeros is not None
    zeros = linear.zeros.transpose(0, 2, 1).reshape(-1, packed.scales.shape[0])
    assert np.array_equal(zeros[: shape.n], solved.zeros.numpy())


def test_columns_of_a_group_lie_together_whatever_their_order_and_number() -> None:
    g_idx = np.array([2, 0, 0, 2, 2] + [3] * 33, np.int32)  # group 1 has no columns
    columns, first_slice = lay_columns(g_idx, 4)
    assert first_slice.tolist() == [0, 1, 1, 2, 4]
    assert columns[:3].tolist() == [1, 2, -1]
    assert columns[32:36].tolist() == [0, 3, 4, -1]
    assert columns[64:98].tolist() == [*range(5, 38), -1]


def test_symmetric_linears_store_no_zero_points_and_weights_begin_at_lines() -> None:
    linear = pack_linear(random_linear(Shape(32, 64, 32), 4, sym=True))
    assert linear.zeros is None
    assert linear.weights.ctypes.data % 64 == 0
    assert linear.nbytes == 32 * 64 // 2 + 32 * 2 * 2
    assert aligned((3, 5), np.float32).ctypes.data % 64 == 0
