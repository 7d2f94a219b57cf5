"""compressed-tensors: there and back, and as the library reads it where that is installed."""

import pytest
import torch

from gptq_models import exact_weight, random_linear
from quantmill.errors import UnsupportedModel
from quantmill.formats import compressed
from quantmill.formats.config import config_from_json
from quantmill.formats.gptq import dequantize, pack
from quantmill.types import ActOrder, PackedLinear, QuantConfig

CONFIGS = [
    QuantConfig(bits, group, sym=sym) for bits in (4, 8) for group in (32, -1) for sym in (True, False)
]


def read(tensors: dict[str, torch.Tensor], config: QuantConfig, in_features: int) -> PackedLinear:
    return compressed.to_packed(
        tensors["weight_packed"],
        tensors["weight_scale"],
        zero_point=tensors.get("weight_zero_point"),
        g_idx=tensors.get("weight_g_idx"),
        bias=tensors.get("bias"),
        config=config,
        in_features=in_features,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_there_and_back_bit_for_bit(config: QuantConfig) -> None:
    linear = random_linear(64, 40, config)
    packed = pack(linear, config)
    tensors = compressed.from_packed(packed, config.sym)
    expected = compressed.tensor_shapes(config, 64, 40)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == expected
    back = read(tensors, config, 64)
    assert torch.equal(dequantize(back, torch.float64), exact_weight(linear))


def test_an_act_order_travels_in_weight_g_idx() -> None:
    config = QuantConfig(4, 32, ActOrder.GROUPED)
    linear = random_linear(64, 8, config, shuffled=True)
    tensors = compressed.from_packed(pack(linear, config), True)
    assert torch.equal(dequantize(read(tensors, config, 64), torch.float64), exact_weight(linear))


@pytest.mark.parametrize(("bits", "size", "words"), [(3, 64, "3 bits"), (4, 48, "do not divide")])
def test_what_does_not_fit_is_refused(bits: int, size: int, words: str) -> None:
    config = QuantConfig(bits, 32)
    with pytest.raises(UnsupportedModel, match=words):
        compressed.from_packed(pack(random_linear(size, 32, config), config), True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_config_comes_back(config: QuantConfig) -> None:
    back = config_from_json(compressed.config_to_json(config, ["lm_head"]))
    assert (back.bits, back.group_size, back.sym) == (config.bits, config.group_size, config.sym)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_library_unpacks_the_same_codes(config: QuantConfig) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="the compressed-tensors library is not installed: pip install 'quantmill[peers]'",
    )
    linear = random_linear(64, 40, config)
    tensors = compressed.from_packed(pack(linear, config), config.sym)
    codes = helpers.unpack_from_int32(tensors["weight_packed"], config.bits, torch.Size((40, 64)))
    assert torch.equal(codes.int() + config.sym_zero, linear.codes.int())
    if not config.sym:
        shape = torch.Size(linear.zeros.shape)
        zeros = helpers.unpack_from_int32(tensors["weight_zero_point"], config.bits, shape, packed_dim=0)
        assert torch.equal(zeros.int() + config.sym_zero, linear.zeros.int())
