"""Packing against big Python integers, which have no words to get wrong."""

import pytest
import torch

from quantmill.formats.bits import pack_words, unpack_words, words_for

BITS = (2, 3, 4, 8)
ROWS = (1, 7, 10, 11, 21, 22, 31, 32, 33, 64, 70, 100, 576)


def stream_of(codes: list[int], bits: int) -> list[int]:
    """The words of one column, as signed 32-bit numbers."""
    number = sum(code << i * bits for i, code in enumerate(codes))
    words = [number >> 32 * i & 0xFFFFFFFF for i in range(words_for(len(codes), bits))]
    return [w - (w >> 31 << 32) for w in words]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_words_are_the_continuous_stream(bits: int, rows: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 3), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.T.tolist() == [stream_of(column, bits) for column in codes.T.tolist()]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_unpacking_undoes_packing(bits: int, rows: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 5), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert torch.equal(unpack_words(words, bits, rows), codes)
    assert torch.equal(unpack_words(words[:, 1:4], bits, rows), codes[:, 1:4])  # also of a view


def test_three_bit_codes_straddle_words() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10] = 0b110  # its low two bits end word 0, its high bit opens word 1
    codes[21] = 0b101  # its low bit ends word 1, the others open word 2
    words = [w & 0xFFFFFFFF for w in pack_words(codes, 3).flatten().tolist()]
    assert words == [0b10 << 30, 1 | 1 << 31, 0b10]


def test_known_four_bit_words() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8] * 8], dtype=torch.uint8).T
    words = [w & 0xFFFFFFFF for w in pack_words(codes, 4).flatten().tolist()]
    assert words == [0x87654321, 0x88888888]


def test_no_columns_and_no_rows() -> None:
    assert pack_words(torch.zeros(8, 0, dtype=torch.uint8), 4).shape == (1, 0)
    assert pack_words(torch.zeros(0, 4, dtype=torch.uint8), 3).shape == (0, 4)
    assert unpack_words(torch.zeros(0, 4, dtype=torch.int32), 3, 0).shape == (0, 4)


def test_our_own_mistakes_stop_at_once() -> None:
    with pytest.raises(AssertionError, match="does not fit 3 bits"):
        pack_words(torch.full((4, 1), 8, dtype=torch.uint8), 3)
    with pytest.raises(AssertionError, match="bytes"):
        pack_words(torch.zeros(4, 1, dtype=torch.int32), 4)
    with pytest.raises(AssertionError, match="do not hold"):
        unpack_words(torch.zeros(1, 1, dtype=torch.int32), 4, 9)
