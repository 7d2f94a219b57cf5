"""GPTQ words -> the layout of the CPU kernels. Runs once per linear, at memory speed.

Reads `qweight` words as they lie in the file (codes along K, lowest bits first) and writes 64-byte lines;
true act order becomes a permutation of columns, stored beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from quantmill.kernels.cpu.jit import VOID, cgutils, entry, intrinsic
from quantmill.kernels.cpu.layout import BLOCK, DENSE, SLICE, CpuLinear, aligned
from quantmill.kernels.cpu.vectors import I32, I64, I32x16, Value, Vectors

if TYPE_CHECKING:
    from quantmill.types import PackedLinear


def pack_linear(packed: PackedLinear) -> CpuLinear:
    """Any GPTQ linear (2, 3, 4, 8 bits, any group size, order and zero points) -> CpuLinear."""
    from quantmill.formats.gptq import unpack_zeros

    format_ = packed.checkpoint_format
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.out_features, format_).numpy()
    scales = packed.scales.numpy().T  # (N, groups)
    bias = None if packed.bias is None else packed.bias.float().numpy()
    return pack_words(packed.qweight.numpy(), scales, zeros, packed.g_idx.numpy(), packed.bits, bias)


def pack_words(
    words: NDArray[np.int32],
    scales: NDArray[np.float16],
    zeros: NDArray[np.uint8],
    g_idx: NDArray[np.int32],
    bits: int,
    bias: NDArray[np.float32] | None = None,
) -> CpuLinear:
    """words (ceil(K*bits/32), N) int32; scales, zeros (N, groups) float16, uint8 true zero points; g_idx
    (K,)."""
    out_features, groups = scales.shape
    blocks = -(-out_features // BLOCK)
    columns, first_slice = lay_columns(g_idx, groups)
    slices = len(columns) // SLICE
    weights = aligned((blocks, slices, bits, 4 * BLOCK), np.uint8)
    short = blocks * BLOCK - out_features
    padded = np.pad(words, ((0, 0), (0, short))) if short else np.ascontiguousarray(words)
    addresses = columns.ctypes.data, weights.ctypes.data
    _fill(padded.ctypes.data, padded.strides[0], len(padded) - 1, *addresses, (blocks, slices), bits)
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    return CpuLinear(
        weights=weights,
        scales=_blocked(scales, np.float16),
        zeros=None if symmetric else _blocked(zeros, np.uint8),
        first_slice=first_slice,
        columns=None if _is_identity(columns, len(g_idx)) else columns,
        bias=_padded_bias(bias, out_features),
        bits=bits,
        in_features=len(g_idx),
        out_features=out_features,
    )


def pack_dense(weight: NDArray[Any], bias: NDArray[np.float32] | None = None) -> CpuLinear:
    """weight (N, K) of any float type -> float16 weights in the layout, for linears that are not
    quantised."""
    out_features, in_features = weight.shape
    blocks, slices = -(-out_features // BLOCK), -(-in_features // SLICE)
    full = np.zeros((blocks * BLOCK, slices * SLICE), np.float16)
    full[:out_features, :in_features] = weight
    weights = aligned((blocks, slices, SLICE, BLOCK), np.float16)
    weights[:] = full.reshape(blocks, BLOCK, slices, SLICE).transpose(0, 2, 3, 1)
    columns, first_slice = lay_columns(np.zeros(in_features, np.int32), 1)
    scales = aligned((blocks, 1, BLOCK), np.float16)
    scales[:] = 1
    return CpuLinear(
        weights=weights.view(np.uint8).reshape(blocks, slices, DENSE, 4 * BLOCK),
        scales=scales,
        zeros=None,
        first_slice=first_slice,
        columns=None if _is_identity(columns, in_features) else columns,
        bias=_padded_bias(bias, out_features),
        bits=DENSE,
        in_features=in_features,
        out_features=out_features,
    )


def pack_rounded(weight: NDArray[Any], group: int = SLICE) -> CpuLinear:
    """weight (N, K) of any float type, rounded to 8 bits, symmetric, `group` columns a scale: for output
    heads."""
    out_features, in_features = weight.shape
    groups, short = -(-in_features // group), -in_features % group
    scales = np.empty((out_features, groups), np.float16)
    words = np.empty((-(-in_features // 4), out_features), np.int32)
    for begin in range(0, out_features, 4096):
        rows = slice(begin, begin + 4096)
        padded = np.pad(weight[rows].astype(np.float32), ((0, 0), (0, short)))
        grouped = padded.reshape(len(padded), groups, group)
        scales[rows] = np.abs(grouped).max(axis=2) / 127
        step = scales[rows].astype(np.float32)[:, :, None]
        codes = np.rint(grouped / np.where(step > 0, step, 1)).clip(-128, 127) + 128
        flat = codes.astype(np.uint8).reshape(len(padded), -1)[:, : 4 * len(words)]
        words[:, rows] = np.ascontiguousarray(flat).view(np.int32).T
    g_idx = (np.arange(in_features) // group).astype(np.int32)
    return pack_words(words, scales, np.full(scales.shape, 128, np.uint8), g_idx, 8)


def lay_columns(g_idx: NDArray[np.int32], groups: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """g_idx (K,) -> input of each place (slices * 32,), -1 where none; first slice of each group (groups +
    1,)."""
    order = np.argsort(g_idx, kind="stable")
    counts = np.bincount(g_idx, minlength=groups)
    first = np.concatenate([[0], np.cumsum(-(-counts // SLICE))]).astype(np.int32)
    begins = np.concatenate([[0], np.cumsum(counts)])
    columns = np.full(first[-1] * SLICE, -1, np.int32)
    rank = np.arange(len(g_idx)) - begins[g_idx[order]]
    columns[first[g_idx[order]] * SLICE + rank] = order
    return columns, first


def stack(linears: Sequence[CpuLinear]) -> CpuLinear | None:
    """Linears that share an input as one: rows of the second follow the padded rows of the first.

    None where they cannot be one: other bits, columns, groups or kind of zero point.
    """
    first = linears[0]
    if not all(_stackable(first, other) for other in linears[1:]):
        return None
    zeros = [linear.zeros for linear in linears if linear.zeros is not None]
    return replace(
        first,
        weights=_joined([linear.weights for linear in linears]),
        scales=_joined([linear.scales for linear in linears]),
        zeros=_joined(zeros) if zeros else None,
        bias=_joined([linear.bias for linear in linears]),
        out_features=BLOCK * sum(linear.blocks for linear in linears),
    )


def block_range(linear: CpuLinear, first: int, last: int) -> CpuLinear:
    """The output rows of blocks [first, last), as views."""
    return replace(
        linear,
        weights=linear.weights[first:last],
        scales=linear.scales[first:last],
        zeros=None if linear.zeros is None else linear.zeros[first:last],
        bias=linear.bias[first * BLOCK : last * BLOCK],
        out_features=min(linear.out_features, last * BLOCK) - first * BLOCK,
    )


def _stackable(a: CpuLinear, b: CpuLinear) -> bool:
    same_columns = (a.columns is None) == (b.columns is None)
    if a.columns is not None and b.columns is not None:
        same_columns = np.array_equal(a.columns, b.columns)
    same_groups = np.array_equal(a.first_slice, b.first_slice)
    return same_columns and same_groups and a.bits == b.bits and (a.zeros is None) == (b.zeros is None)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    out = aligned((sum(len(p) for p in parts), *parts[0].shape[1:]), parts[0].dtype.type)
    np.concatenate(parts, out=out)
    return out


def _blocked(values: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """(N, groups) -> (blocks, groups, 16), rows that do not exist zero."""
    rows, groups = values.shape
    blocks = -(-rows // BLOCK)
    full = np.zeros((blocks * BLOCK, groups), dtype)
    full[:rows] = values
    out = aligned((blocks, groups, BLOCK), dtype)
    out[:] = full.reshape(blocks, BLOCK, groups).transpose(0, 2, 1)
    return out


def _padded_bias(bias: NDArray[np.float32] | None, rows: int) -> NDArray[np.float32]:
    out = aligned((-(-rows // BLOCK) * BLOCK,), np.float32)
    out[:] = 0
    if bias is not None:
        out[:rows] = bias
    return out


def _is_identity(columns: NDArray[np.int32], inputs: int) -> bool:
    return len(columns) == inputs and bool((columns == np.arange(inputs)).all())


@entry
def _fill(
    words: int, row_bytes: int, last_row: int, columns: int, out: int, shape: tuple[int, int], bits: int
) -> None:
    """Fill out (blocks, slices, bits lines) from words (last_row + 1, 16 * blocks); arrays by address."""
    blocks, slices = shape
    for begin in range(0, blocks, 8):  # neighbours read the same pages of words
        for s in range(slices):
            for block in range(begin, min(begin + 8, blocks)):
                place = out + (block * slices + s) * bits * 64
                given = (words + block * 64, row_bytes, last_row, columns + s * 128, place)
                if bits == 4:
                    _fill_slice(4, given)
                elif bits == 8:
                    _fill_slice(8, given)
                elif bits == 3:
                    _fill_slice(3, given)
                else:
                    _fill_slice(2, given)


@intrinsic
def _fill_slice(context: Any, bits: Any, given: Any) -> Any:
    """One slice of one block; given: words of the block's first row, bytes per row of words, last row,
    columns, out."""
    width = bits.literal_value

    def emit(c: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words, row_bytes, last_row, columns, out = cgutils.unpack_tuple(builder, arguments[1])
        v = Vectors(builder)
        lines = [v.constant(I32x16, 0)] * width
        for place in range(SLICE):
            column = v.load(builder.add(columns, v.int64(4 * place)), I32, 4)
            code = _column_codes(v, words, row_bytes, last_row, column, width)
            for line, mask, shift in _targets(width, place):
                part = builder.and_(code, v.constant(I32x16, mask))
                move = builder.shl if shift >= 0 else builder.lshr
                moved = move(part, v.constant(I32x16, abs(shift)))
                lines[line] = builder.or_(lines[line], moved)
        for i, line in enumerate(lines):
            v.store(line, builder.add(out, v.int64(64 * i)), 64)
        return c.get_dummy_value()

    return VOID(bits, given), emit


def _column_codes(
    v: Vectors, words: Value, row_bytes: Value, last_row: Value, column: Value, bits: int
) -> Value:
    """Codes of 16 rows at a column (16 x int32), zero where the column is -1."""
    b = v.builder
    missing = b.icmp_signed("<", column, ir.Constant(I32, 0))
    bit = b.mul(b.select(missing, ir.Constant(I32, 0), column), ir.Constant(I32, bits))
    row, shift = b.lshr(bit, ir.Constant(I32, 5)), b.and_(bit, ir.Constant(I32, 31))
    row = b.zext(row, I64)
    low = v.load(b.add(words, b.mul(row, row_bytes)), I32x16, 4)
    code = b.lshr(low, v.splat(shift))
    if 32 % bits:  # the rest of a 3-bit code may lie in the next word; the last word has no next
        following = b.add(row, v.int64(1))
        following = b.select(b.icmp_signed(">", following, last_row), last_row, following)
        high = v.load(b.add(words, b.mul(following, row_bytes)), I32x16, 4)
        left = b.shl(high, v.constant(I32x16, 1))
        code = b.or_(code, b.shl(left, v.splat(b.sub(ir.Constant(I32, 31), shift))))
    mask = b.select(missing, ir.Constant(I32, 0), ir.Constant(I32, 2**bits - 1))
    return b.and_(code, v.splat(mask))


def _targets(bits: int, place: int) -> list[tuple[int, int, int]]:
    """Where the code of a column goes: (line, mask of the code, left shift in the lane), as dots.py reads
    them."""
    word, byte = place // 4, 8 * (place % 4)
    per_line = {8: 1, 4: 2, 3: 4, 2: 4}[bits]
    step = {8: 8, 4: 4, 3: 2, 2: 2}[bits]
    low = (word // per_line, 3 if bits == 3 else 2**bits - 1, byte + step * (word % per_line))
    return [low, (2, 4, byte + word - 2)] if bits == 3 else [low]
