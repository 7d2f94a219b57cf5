"""QuantLinear: the file's tensors survive whatever torch does to a module, and the product is right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gptq_models import exact_weight, random_linear
from quantmill.errors import BadRequest, UnsupportedModel
from quantmill.formats.gptq import pack
from quantmill.runtime.linear import (
    QuantLinear,
    explain_linears,
    prepare_linears,
    quant_linears,
    replace_linears,
)
from quantmill.types import CheckpointFormat, QuantConfig

pytestmark = pytest.mark.usefixtures("exact_products")

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "bias")
CONFIG = QuantConfig(group_size=32)


def make(config: QuantConfig = CONFIG, *, bias: bool = True, seed: int = 0):
    linear = random_linear(96, 64, config, seed=seed)
    return exact_weight(linear).float(), pack(linear, config, torch.randn(64).half() if bias else None)


def expect(layer: QuantLinear, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(2, 3, 96).to(dtype)
    bias = 0 if layer.bias is None else layer.bias.float()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(x).float(), x.float() @ weight.T + bias, **tolerance)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_from_packed_to_packed_is_the_same_tensors(bits, sym):
    config = QuantConfig(bits=bits, group_size=32, sym=sym)
    weight, packed = make(config)
    layer = QuantLinear.from_packed(packed)
    again = layer.to_packed()
    assert all(getattr(again, s) is getattr(packed, s) for s in SUFFIXES)
    assert again.checkpoint_format is packed.checkpoint_format is config.zero_format
    expect(layer, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_the_file(bias):
    weight, packed = make(bias=bias)
    state = QuantLinear.from_packed(packed).state_dict()
    assert list(state) == [s for s in ("qweight", "qzeros", "g_idx", "scales", "bias") if s != "bias" or bias]
    empty = QuantLinear(96, 64, CONFIG, bias=bias)
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    empty.load_state_dict(state)
    expect(empty, weight)


def test_loading_over_a_prepared_layer_is_noticed():
    first, packed = make(seed=1)
    layer = QuantLinear.from_packed(packed)
    expect(layer, first)
    second, other = make(seed=2)
    layer.load_state_dict(QuantLinear.from_packed(other).state_dict())
    expect(layer, second)


def test_new_buffers_are_noticed():
    """As accelerate's hooks do with offloaded modules: set the tensors, call, take them away."""
    first, packed = make(seed=1, bias=False)
    layer = QuantLinear.from_packed(packed)
    expect(layer, first)
    second, other = make(seed=2, bias=False)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        setattr(layer, name, getattr(other, name))
    expect(layer, second)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_change_of_dtype_leaves_the_file_alone(change):
    weight, packed = make()
    layer = QuantLinear.from_packed(packed)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    change(layer)
    assert all(
        v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in layer.state_dict().items()
    )
    expect(layer, weight, torch.bfloat16)


def test_prepared_state_is_not_copied_nor_pickled():
    weight, packed = make()
    layer = QuantLinear.from_packed(packed)
    expect(layer, weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._ready is None
        expect(twin, weight)


def test_prepared_under_inference_mode_still_serves_autograd():
    weight, packed = make()
    layer = QuantLinear.from_packed(packed)
    with torch.inference_mode():
        layer(torch.randn(1, 96))
    x = torch.randn(1, 96, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], weight.sum(0), rtol=1e-4, atol=1e-4)


def test_to_linear_is_the_dequantised_layer():
    weight, packed = make()
    linear = QuantLinear.from_packed(packed).to_linear(torch.float32)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, packed.bias.float())


def test_repr_says_the_parameters():
    layer = QuantLinear(96, 64, QuantConfig(bits=3, group_size=-1))
    assert repr(layer) == "QuantLinear(96, 64, bias=False, bits=3, group=96)"


def small_model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(96, 64), "b": nn.Linear(96, 64, bias=False), "n": nn.LayerNorm(64)})


def test_replace_linears_takes_the_named_ones():
    model = small_model().eval()
    replace_linears(model, ["a"], CONFIG)
    assert list(quant_linears(model)) == ["a"]
    assert isinstance(model["b"], nn.Linear)
    assert model["a"].bias is not None
    assert not model["a"].training


def test_replace_linears_can_be_told_the_biases_and_stays_on_meta():
    with torch.device("meta"):
        model = small_model()
    replace_linears(model, ["a", "b"], CONFIG, biased=["b"])
    assert model["a"].bias is None
    assert model["b"].bias.device.type == model["b"].qweight.device.type == "meta"


@pytest.mark.parametrize(("name", "found"), [("n", "LayerNorm"), ("c", "nothing")])
def test_replace_linears_refuses_what_is_no_linear(name, found):
    with pytest.raises(UnsupportedModel, match=rf"quantised {name}, .*{found} there"):
        replace_linears(small_model(), [name], CONFIG)


def test_prepare_linears_says_what_it_chose():
    model = small_model()
    for name in ("a", "b"):
        model[name] = QuantLinear.from_packed(make()[1])
    said = prepare_linears(model, torch.float32, "reference")
    assert said == explain_linears(model)
    assert said.startswith("2 linears: reference on cpu, float32, 1 rows: dequantises at every call")
    assert model["a"].kept_weights == 2 * 96 * 64
    assert model["a"]._ready[1].steps[0][1].name == "reference"
    assert prepare_linears(model, torch.float32, "dense").startswith("2 linears: dense")
    with pytest.raises(BadRequest, match="no backend is called"):
        prepare_linears(model, torch.float32, "marlin")


def test_the_zero_convention_is_honoured():
    config = QuantConfig(group_size=32, checkpoint_format=CheckpointFormat.GPTQ_V2)
    weight, packed = make(config)
    expect(QuantLinear.from_packed(packed), weight)
