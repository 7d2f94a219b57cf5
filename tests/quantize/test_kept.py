"""What a run keeps between blocks is what was solved, to the last code."""

import pytest
import torch

from gptq_models import random_linear
from quantmill.quantize.kept import packed_tensors, unpacked
from quantmill.types import QuantConfig


@pytest.mark.parametrize(
    ("bits", "group_size", "sym"), [(2, 32, False), (3, 128, True), (4, -1, False), (8, 64, True)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_and_back(bits: int, group_size: int, sym: bool, bias: bool) -> None:
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym)
    linear = random_linear(160, 32, config, shuffled=group_size > 0)
    values = torch.nn.Parameter(torch.randn(32)) if bias else None
    kept = packed_tensors("model.layers.0.mlp.up_proj", linear, config, values)
    assert {name.rpartition(".")[0] for name in kept} == {"model.layers.0.mlp.up_proj"}
    assert ("model.layers.0.mlp.up_proj.bias" in kept) is bias
    assert not any(t.requires_grad for t in kept.values())
    again = unpacked(kept, "model.layers.0.mlp.up_proj", config, torch.device("cpu"))
    for name in ("codes", "zeros", "g_idx"):
        assert torch.equal(getattr(again, name).int(), getattr(linear, name).int()), name
    assert torch.equal(again.scales.half(), linear.scales.half())
