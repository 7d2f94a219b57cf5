"""Which primitives a device gets."""

from __future__ import annotations

import torch

from quantmill.quantize.columns import round_columns_torch
from quantmill.quantize.machines import machine_of


def test_a_cpu_gets_numba_and_the_unknown_get_torch() -> None:
    assert machine_of(torch.device("cpu")).name == "numba"
    plain = machine_of(torch.device("meta"))
    assert plain.round_columns is round_columns_torch
    assert not plain.fused_refit(32)
    assert machine_of(torch.device("cpu")) is machine_of(torch.device("cpu"))
