"""Block types against the `gguf` package: same values from random bytes, same bytes back."""

import gguf
import numpy as np
import pytest

from quantmill.errors import UnsupportedModel
from quantmill.formats import gguf as ours


def random_blocks(kind: ours.BlockType, count: int = 300) -> np.ndarray:
    """Random bytes, with float16 fields that are finite."""
    rng = np.random.default_rng(kind.number)
    raw = rng.integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    at = 0
    for part in kind.parts:
        if part in ("d", "m"):
            raw[:, at : at + 2] = rng.normal(0, 0.1, count).astype(np.float16).view(np.uint8).reshape(-1, 2)
        at += ours._part_bytes(part, kind.block)
    return raw


@pytest.mark.parametrize("name", ours.TYPES)
def test_size_and_number_are_the_gguf_packages(name: str) -> None:
    kind = ours.TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert kind.number == theirs
    assert (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[theirs]


@pytest.mark.parametrize("name", ours.TYPES)
def test_values_are_the_gguf_packages_bit_for_bit(name: str) -> None:
    kind = ours.TYPES[name]
    raw = random_blocks(kind)
    theirs = gguf.quants.dequantize(raw.reshape(20, -1), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ours.dequantize(kind, raw.reshape(20, -1)), theirs)


@pytest.mark.parametrize("name", ours.TYPES)
def test_packing_gives_the_same_bytes_back(name: str) -> None:
    kind = ours.TYPES[name]
    raw = random_blocks(kind)
    blocks = ours.unpack(kind, raw)
    assert int(blocks.codes.max()) == kind.max_code
    if kind.scale_range is not None:
        assert blocks.scales is not None
        assert (blocks.scales.min(), blocks.scales.max()) == kind.scale_range
    np.testing.assert_array_equal(ours.pack(kind, blocks), raw)


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="multiple of 256 columns, not 576"):
        ours.row_bytes(ours.TYPES["Q4_K"], 576)
    assert ours.row_bytes(ours.TYPES["Q4_0"], 576) == 18 * 18


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"IQ1_S.*Q4_0"):
        ours.block_type("IQ1_S")
