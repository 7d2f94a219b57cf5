"""The self-test passes what is right and refuses a module that is not, by its name."""

from __future__ import annotations

import pytest
import torch

from gptq_models import write_quantized
from quantmill.errors import QuantmillError
from quantmill.runtime.gpu import weights
from quantmill.runtime.gpu.decoder import GpuRuntime
from quantmill.types import ActOrder, QuantConfig
from tiny_models import tiny_model

ORDERED = QuantConfig(bits=4, group_size=16, act_order=ActOrder.GROUPED)


def opened(folder, device) -> GpuRuntime:
    return GpuRuntime.from_folder(folder, device=device, context=64, kv_tokens=64)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_orders_and_biases_pass(family, tmp_path, device):
    write_quantized(tmp_path, tiny_model(family, num_hidden_layers=1), ORDERED, shuffled=True)
    assert not opened(tmp_path, device).model.weights.probes


@pytest.mark.parametrize("module", ["k_proj", "up_proj", "down_proj"])
def test_a_wrong_module_is_named(module, tmp_path, device, monkeypatch):
    """Zero points of one module are taken for another after the probe was made."""
    write_quantized(tmp_path, tiny_model("llama", num_hidden_layers=1), QuantConfig(bits=4, group_size=32))
    right = weights._Reader.packed

    def wrong(reader, name):
        packed = right(reader, name)
        if name.endswith(module):
            packed.scales.mul_(1.1)
        return packed

    monkeypatch.setattr(weights._Reader, "packed", wrong)
    with pytest.raises(QuantmillError, match=f"layers.0.*{module}"):
        opened(tmp_path, device)


def test_it_can_be_left_out(tmp_path, device, monkeypatch):
    write_quantized(tmp_path, tiny_model("llama", num_hidden_layers=1), QuantConfig(bits=4, group_size=32))
    monkeypatch.setattr("quantmill.runtime.gpu.checking.compare", lambda *found: pytest.fail("it ran"))
    GpuRuntime.from_folder(tmp_path, device=device, context=64, kv_tokens=64, selftest=False)
    assert torch.is_inference_mode_enabled() is False
