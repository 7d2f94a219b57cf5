"""The trial passes the kernels as they are, for any heads, and names one that is off."""

from __future__ import annotations

import pytest
import torch

from quantmill.errors import UnsupportedModel
from quantmill.runtime.gpu import drawing, tensors, trial
from quantmill.runtime.gpu.trial import torch_attends, try_kernels


def heads(device: torch.device, window: int = 0, norms: bool = False) -> tensors.Heads:
    table = torch.ones(4, 8, device=device)
    gains = (torch.linspace(0.5, 1.5, 16, device=device) if norms else None,) * 2
    return tensors.Heads(4, 2, 16, 1e-5, table, table, *gains, window)


@pytest.mark.parametrize(("window", "norms", "fp8"), [(0, False, False), (4096, True, True)])
def test_the_kernels_pass(device, window, norms, fp8, monkeypatch):
    monkeypatch.setattr(drawing, "HELD", 600)
    try_kernels(heads(device, window, norms), torch.float16, fp8)


@pytest.mark.parametrize("name", ["attend_rows", "gated", "dense", "draw"])
def test_a_kernel_that_is_off_is_named(device, name, monkeypatch):
    monkeypatch.setattr(drawing, "HELD", 600)
    right = getattr(trial.twins, name)

    def wrong(first, *others, **options):
        return right(-first, *others, **options)

    monkeypatch.setattr(trial.twins, name, wrong)
    kernels = {"attend_rows": "rows", "gated": "norms"}
    with pytest.raises(UnsupportedModel, match=f"for {kernels.get(name, name)} are off"):
        try_kernels(heads(device), torch.float16, fp8=False)


def test_prompts_go_without_torchs_attention_where_it_is_off(device, monkeypatch, caplog):
    assert torch_attends(heads(device), torch.float16)
    right = trial.prompts.attend_prompt
    monkeypatch.setattr(trial.prompts, "attend_prompt", lambda *inputs: -right(*inputs))
    monkeypatch.setattr(trial.prompts, "FROM", (0, 0))
    assert not torch_attends(heads(device), torch.float16)
    assert "torch's attention is off" in caplog.text

    def missing(*inputs):
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(trial.prompts, "attend_prompt", missing)
    assert not torch_attends(heads(device), torch.float16)
    assert "No available kernel" in caplog.text
