"""AWQ's GEMM layout: by its definition, there and back, and the compiled loop against its twin."""

from dataclasses import replace

import pytest
import torch

from gptq_models import exact_weight, random_linear
from quantmill.errors import UnsupportedModel
from quantmill.formats import awq
from quantmill.formats.gptq import dequantize, pack
from quantmill.types import ActOrder, CheckpointFormat, QuantConfig

ASYM = QuantConfig(4, 32, sym=False)


def by_definition(tensors: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """W (N, K) float64, nibble by nibble."""
    scales = tensors["scales"].double()

    def nibble(words: torch.Tensor, row: int, column: int) -> int:
        word = int(words[row, column // 8]) & 0xFFFFFFFF
        return word >> 4 * [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8) & 15

    K, N = tensors["qweight"].shape[0], scales.shape[1]
    W = torch.empty(N, K, dtype=torch.float64)
    for k in range(K):
        for n in range(N):
            g = k // group
            centred = nibble(tensors["qweight"], k, n) - nibble(tensors["qzeros"], g, n)
            W[n, k] = scales[g, n] * centred
    return W


@pytest.mark.parametrize("config", [QuantConfig(4, 32), ASYM, QuantConfig(4, -1)], ids=str)
def test_written_as_defined_and_read_back_bit_for_bit(config: QuantConfig) -> None:
    linear = random_linear(64, 40, config)
    packed = pack(linear, config)
    tensors = awq.from_packed(packed)
    shapes = awq.tensor_shapes(config.group_size, 64, 40)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    group = config.effective_group(64)
    torch.testing.assert_close(by_definition(tensors, group), exact_weight(linear), rtol=0, atol=0)
    back = awq.to_packed(tensors["qweight"], tensors["qzeros"], tensors["scales"], None)
    assert back.checkpoint_format is CheckpointFormat.GPTQ_V2
    assert back.group_size == config.group_size
    assert torch.equal(back.qweight, packed.qweight)
    assert torch.equal(back.g_idx, packed.g_idx)
    assert torch.equal(dequantize(back, torch.float32), dequantize(packed, torch.float32))


@pytest.mark.parametrize("shape", [(8, 1), (16, 3), (64, 16), (136, 17)])
def test_the_compiled_transpose_is_its_twin(shape: tuple[int, int]) -> None:
    words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(1)).int()
    assert torch.equal(awq.transpose_words(words), awq.transpose_words_torch(words))


def test_rows_that_fill_no_word_take_the_slow_way() -> None:
    words = torch.randint(-(2**31), 2**31, (12, 4)).int()
    assert awq.transpose_words(words).shape == (2, 32)


def test_a_bias_goes_along() -> None:
    packed = pack(random_linear(32, 8, ASYM), ASYM, bias=torch.arange(8.0))
    assert torch.equal(awq.from_packed(packed)["bias"], torch.arange(8.0).half())


@pytest.mark.parametrize(
    ("config", "sizes", "shuffled", "words"),
    [
        (QuantConfig(8, 32), (64, 8), False, "8 bits, AWQ has 4"),
        (QuantConfig(4, 32, ActOrder.GROUPED), (64, 8), True, "act order"),
        (QuantConfig(4, 32), (48, 8), False, "groups of 32 do not divide its 48"),
        (QuantConfig(4, 32), (64, 12), False, "12 outputs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(config, sizes, shuffled, words) -> None:
    packed = pack(random_linear(*sizes, config, shuffled=shuffled), config)
    with pytest.raises(UnsupportedModel, match=words):
        awq.from_packed(packed)


def test_nothing_else_is_refused() -> None:
    packed = pack(random_linear(64, 8, ASYM), ASYM)
    assert awq.refusal(packed) is None
    assert awq.refusal(replace(packed, group_size=-1)) is not None  # its g_idx has two groups
