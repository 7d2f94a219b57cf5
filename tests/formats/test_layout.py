"""Sizes, checked against real tensors and against the published model."""

import pytest
import torch

from gptq_models import random_linear
from quantmill.formats.gptq import bits_per_weight, pack, packed_bytes
from quantmill.types import QuantConfig


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size"), [(576, 70, 128), (37, 33, -1), (64, 64, 32)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_are_those_of_the_tensors(bits, in_features, out_features, group_size, bias) -> None:
    config = QuantConfig(bits=bits, group_size=group_size)
    linear = random_linear(in_features, out_features, config)
    packed = pack(linear, config, torch.zeros(out_features) if bias else None)
    tensors = [packed.qweight, packed.qzeros, packed.scales, packed.g_idx]
    tensors += [packed.bias] if bias else []
    assert packed_bytes(config, in_features, out_features, bias) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_bits_per_weight(bits: int, group_size: int) -> None:
    config = QuantConfig(bits=bits, group_size=group_size)
    assert bits_per_weight(config, 4096, 1024) == bits + (16 + bits) / group_size


def test_padding_costs_bits() -> None:
    config = QuantConfig(bits=3, group_size=128)
    assert bits_per_weight(config, 576, 64) == pytest.approx(3 + 19 * 5 / 576)
    assert bits_per_weight(config, 70, 10) > 3 + 19 / 128
