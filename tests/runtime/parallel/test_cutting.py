"""Parts of packed linears stand for parts of the weight, bit for bit, for every width, group and order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq_models import random_linear
from quantmill.formats.gptq import dequantize, is_sequential, pack
from quantmill.runtime.parallel.cutting import take_inputs, take_outputs
from quantmill.types import PackedLinear, QuantConfig

N, K = 72, 160


def packed_linear(bits: int, group: int, shuffled: bool = False, sym: bool = False) -> PackedLinear:
    config = QuantConfig(bits=bits, group_size=group, sym=sym)
    return pack(random_linear(K, N, config, shuffled=shuffled), config, torch.arange(float(N)).half())


CASES = [(b, g, s) for b in (2, 3, 4, 8) for g in (16, 64, -1) for s in (False, True)]


@pytest.mark.parametrize(("bits", "group", "shuffled"), CASES)
def test_some_outputs(bits: int, group: int, shuffled: bool) -> None:
    whole = packed_linear(bits, group, shuffled)
    for index in (torch.arange(8, 40), torch.tensor([71, 3, 3, 0, 50])):
        part = take_outputs(whole, index)
        assert torch.equal(dequantize(part, torch.float16), dequantize(whole, torch.float16)[index])
        assert part.bias is not None
        assert torch.equal(part.bias, index.half())
        assert part.out_features == len(index)


@pytest.mark.parametrize(("bits", "group", "shuffled"), CASES)
@pytest.mark.parametrize("ends", [(0, 64), (64, 160), (48, 112), (96, 160), (5, 6)])
def test_some_inputs(bits: int, group: int, shuffled: bool, ends: tuple[int, int]) -> None:
    whole = packed_linear(bits, group, shuffled)
    weight = dequantize(whole, torch.float16)
    sorted_by_group = torch.argsort(whole.g_idx, stable=True)
    for index in (torch.arange(*ends), sorted_by_group[slice(*ends)], torch.arange(*ends).flip(0)):
        part = take_inputs(whole, index)
        assert torch.equal(dequantize(part, torch.float16), weight[:, index])
        assert part.in_features == len(index)
        groups = len(part.scales)
        assert part.g_idx.tolist() == [int(g) for g in part.g_idx if 0 <= g < groups]
        assert groups == len(whole.g_idx[index].unique()), "no scale that no input has"


def test_whole_groups_in_their_order_need_no_order() -> None:
    whole = packed_linear(4, 16, shuffled=True)
    assert not is_sequential(whole.g_idx, 16)
    part = take_inputs(whole, torch.argsort(whole.g_idx, stable=True)[32:96])
    assert part.group_size == 16
    assert is_sequential(part.g_idx, 16)


def test_half_a_group_takes_its_scales_along() -> None:
    whole = packed_linear(4, 64)
    part = take_inputs(whole, torch.arange(32, 128))  # half a group, then a whole one
    assert part.g_idx.tolist() == [0] * 32 + [1] * 64
    assert part.group_size == 32, "the size of which nothing is filled up"
    assert torch.equal(part.scales, whole.scales[:2])


def test_words_are_taken_as_they_lie() -> None:
    whole = packed_linear(3, 32, sym=True)
    part = take_inputs(whole, torch.arange(32, 96))
    assert part.qweight.data_ptr() == whole.qweight[3:].data_ptr()
    again = take_inputs(replace(whole, qweight=whole.qweight.clone()), torch.arange(32, 96).clone())
    assert torch.equal(part.qweight, again.qweight)
