"""A linear as the CPU kernels read it, and its descriptor: the record of addresses that compiled code gets.

Block b holds output rows 16 b to 16 b + 15. Columns are laid in slices of 32, a group's columns together,
the last slice of a group filled up with columns that multiply nothing. A slice of a block is `bits` lines
of 64 bytes (dots.py). Knows no file format and no instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # output rows
SLICE = 32  # columns
DENSE = 16  # "bits" of a linear that is not quantised: float16 weights, one group, scales of 1

# Fields of a descriptor, int64 each.
FIELD_FUNCTION = 0  # address of the product (products.py)
FIELD_WEIGHTS = 1
FIELD_SCALES = 2
FIELD_ZEROS = 3
FIELD_FIRST_SLICE = 4
FIELD_COLUMNS = 5  # 0: the identity
FIELD_BIAS = 6
FIELD_BLOCKS = 7
FIELD_SLICES = 8
FIELD_GROUPS = 9
FIELD_ZERO = 10  # minus the zero point of every group where symmetric, -1 where not, 0 where there is none
FIELD_PRECISION = 11
FIELDS = 12


class Precision(IntEnum):
    """How activations enter a product; the value is the bytes that each of them takes.

    INT8   8 bits, 32 of them with a scale
    INT16  the same with what that rounding left in 8 bits more, 15 in all: twice the multiplications
    EXACT  fp32, weights dequantised in registers
    """

    INT8 = 1
    INT16 = 2
    EXACT = 4


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A packed linear; every array is contiguous and, the index arrays aside, begins at a multiple of 64
    bytes."""

    weights: NDArray[np.uint8]  # (blocks, slices, bits, 64); 16 bits: float16, (32 columns, 16 rows) a slice
    scales: NDArray[np.float16]  # (blocks, groups, 16)
    zeros: NDArray[np.uint8] | None  # (blocks, groups, 16); None: symmetric, 2^(bits-1) everywhere
    first_slice: NDArray[np.int32]  # (groups + 1,)
    columns: (
        NDArray[np.int32] | None
    )  # (slices * 32,) input of each place, -1: none; None: place i is input i
    bias: NDArray[np.float32]  # (blocks * 16,)
    bits: int
    in_features: int
    out_features: int

    @property
    def blocks(self) -> int:
        return int(self.weights.shape[0])

    @property
    def slices(self) -> int:
        return int(self.weights.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes read for one product: codes, scales and zero points."""
        return self.weights.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def descriptor(linear: CpuLinear, function: int, precision: Precision) -> NDArray[np.int64]:
    """The record of `linear` for compiled code; valid while `linear` and the function live."""
    record = np.zeros(FIELDS, np.int64)
    record[FIELD_FUNCTION] = function
    record[FIELD_WEIGHTS] = linear.weights.ctypes.data
    record[FIELD_SCALES] = linear.scales.ctypes.data
    record[FIELD_ZEROS] = 0 if linear.zeros is None else linear.zeros.ctypes.data
    record[FIELD_FIRST_SLICE] = linear.first_slice.ctypes.data
    record[FIELD_COLUMNS] = 0 if linear.columns is None else linear.columns.ctypes.data
    record[FIELD_BIAS] = linear.bias.ctypes.data
    record[FIELD_BLOCKS] = linear.blocks
    record[FIELD_SLICES] = linear.slices
    record[FIELD_GROUPS] = linear.first_slice.size - 1
    record[FIELD_ZERO] = _zero(linear)
    record[FIELD_PRECISION] = precision
    return record


def _zero(linear: CpuLinear) -> int:
    if linear.zeros is not None:
        return -1
    return 0 if linear.bits == DENSE else -int(2 ** (linear.bits - 1))


def aligned(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Uninitialised array that begins at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)
