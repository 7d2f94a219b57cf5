"""GGUF rows <-> packed linears: the same values, and an honest None or refusal where that cannot be."""

import numpy as np
import pytest
import torch

from gptq_models import exact_weight, random_linear
from quantmill.errors import UnsupportedModel
from quantmill.formats import gguf_linear
from quantmill.formats.gguf import TYPES, dequantize
from quantmill.formats.gptq import dequantize as dequantize_packed
from quantmill.formats.gptq import pack
from quantmill.formats.repack_numba import whole_zeros
from quantmill.types import ActOrder, QuantConfig


def random_rows(name: str, outputs: int, columns: int) -> np.ndarray:
    kind = TYPES[name]
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 256, (outputs, columns // 32, kind.nbytes), dtype=np.uint8)
    for half in range(2 if kind.has_min else 1):
        values = rng.normal(0, 0.1, rows.shape[:2]).astype(np.float16)
        rows[..., 2 * half : 2 * half + 2] = values.view(np.uint8).reshape(*values.shape, 2)
    return rows.reshape(outputs, -1)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize(
    ("outputs", "columns"), [(1, 32), (63, 64), (64, 64), (255, 32), (256, 96), (257, 64)]
)
def test_the_compiled_loops_are_their_twin(name: str, outputs: int, columns: int) -> None:
    rows = random_rows(name, outputs, columns)
    fast, slow = gguf_linear.split(TYPES[name], rows), gguf_linear.split_slowly(TYPES[name], rows)
    for ours, theirs in zip(fast, slow, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("spoilt", [None, "half a step", "below", "above", "no scale"])
def test_zeros_of_minima_are_their_twin(spoilt: str | None) -> None:
    d = 2.0 ** torch.randint(-9, -5, (5, 33)).half() * torch.where(torch.rand(5, 33) < 0.5, -1.0, 1.0).half()
    m = -d * torch.randint(0, 16, d.shape).half()
    d[1, 2] = m[1, 2] = 0  # a group of zeros
    levels = {"half a step": 2.5, "below": -1.0, "above": 16.0}
    if spoilt in levels:
        m[4, 32] = -d[4, 32] * levels[spoilt]
    if spoilt == "no scale":
        d[4, 32], m[4, 32] = 0, 0.5
    fast, slow = whole_zeros(d, m), gguf_linear.whole_zeros_torch(d, m)
    assert (fast is None) == (slow is None) == (spoilt is not None)
    assert fast is None or torch.equal(fast, slow)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_symmetric_types_run_from_their_own_codes(name: str) -> None:
    rows = random_rows(name, 24, 96)
    packed = gguf_linear.to_packed(TYPES[name], rows)
    assert packed is not None
    assert (packed.group_size, packed.in_features, packed.out_features) == (32, 96, 24)
    ours = dequantize_packed(packed, torch.float32)
    assert torch.equal(ours, torch.from_numpy(dequantize(TYPES[name], rows)))


def test_q4_1_runs_from_its_own_codes_where_minima_are_whole_steps() -> None:
    assert gguf_linear.to_packed(TYPES["Q4_1"], random_rows("Q4_1", 8, 64)) is None
    linear = random_linear(64, 8, QuantConfig(4, 32, sym=False))
    linear.scales.copy_(2.0 ** torch.randint(-9, -5, linear.scales.shape))
    config = QuantConfig(4, 32, sym=False)
    rows = gguf_linear.from_packed(pack(linear, config), TYPES["Q4_1"])
    packed = gguf_linear.to_packed(TYPES["Q4_1"], rows)
    assert packed is not None
    assert torch.equal(dequantize_packed(packed, torch.float64), exact_weight(linear))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_1", "IQ4_NL"])
def test_other_types_are_left_to_dequantising(name: str) -> None:
    assert gguf_linear.to_packed(TYPES[name], np.zeros((2, TYPES[name].nbytes), np.uint8)) is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_symmetric_gptq_goes_out_without_loss(bits: int, group: int) -> None:
    config = QuantConfig(bits, group)
    linear = random_linear(256, 20, config)
    packed = pack(linear, config)
    kind = gguf_linear.lossless_type(packed)
    assert kind.name == {4: "Q4_0", 8: "Q8_0"}[bits]
    rows = gguf_linear.from_packed(packed, kind)
    assert torch.equal(torch.from_numpy(dequantize(kind, rows)).double(), exact_weight(linear))


def test_asymmetric_gptq_goes_out_up_to_the_rounding_of_the_minimum() -> None:
    config = QuantConfig(4, 64, sym=False)
    linear = random_linear(128, 20, config)
    packed = pack(linear, config)
    kind = gguf_linear.lossless_type(packed)
    assert kind.name == "Q4_1"
    ours = torch.from_numpy(dequantize(kind, gguf_linear.from_packed(packed, kind))).double()
    group = linear.g_idx.long()
    minimum = (linear.scales.double() * linear.zeros.double())[:, group]
    allowed = minimum.abs() * 2.0**-11 + linear.scales.double()[:, group] * linear.codes * 2.0**-23 + 2.0**-25
    assert bool(((ours - exact_weight(linear)).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("config", "size", "shuffled", "words"),
    [
        (QuantConfig(3, 32), 64, False, "3-bit symmetric"),
        (QuantConfig(8, 32, sym=False), 64, False, "8-bit asymmetric"),
        (QuantConfig(4, 16), 64, False, "groups of 16"),
        (QuantConfig(4, 32, ActOrder.GROUPED), 64, True, "act order"),
    ],
)
def test_what_no_type_holds_is_refused(config, size, shuffled, words) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        gguf_linear.lossless_type(pack(random_linear(size, 32, config, shuffled=shuffled), config))
