"""The trials that kernels must pass before they are used: they pass, and what is broken does not."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed")

from quantmill.quantize import trials
from quantmill.quantize.columns import round_columns_torch
from quantmill.quantize.columns_triton import round_columns_triton
from quantmill.quantize.descent import descend_block_torch
from quantmill.quantize.descent_triton import descend_block_triton
from quantmill.quantize.grids import fit_groups_torch
from quantmill.quantize.grids_triton import fit_groups


def test_the_kernels_pass(device: torch.device) -> None:
    rows = 4096 if device.type == "cuda" else 40
    assert trials.columns_agree(round_columns_triton, device.type, rows)
    assert trials.descent_agrees(descend_block_triton, device.type, rows)
    assert trials.grids_agree(fit_groups, device.type, rows // 8)
    assert all(trials.products_agree(width, device.type, rows) for width in (16, 32, 64, 128))


def test_what_is_wrong_fails_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def off_by_one(*arguments):
        codes, values = round_columns_torch(*arguments)
        return codes ^ 1, values

    def unbuildable(*arguments):
        raise RuntimeError("out of registers")

    with caplog.at_level(logging.WARNING):
        assert not trials.columns_agree(off_by_one, "cpu", 64)
        assert not trials.descent_agrees(lambda *a: (descend_block_torch(*a)[0], a[0]), "cpu", 64)
        assert not trials.grids_agree(lambda *a: tuple(2 * t for t in fit_groups_torch(*a)), "cpu", 8)
        assert not trials.grids_agree(unbuildable, "cpu", 8)
    assert "columns gives other results here" in caplog.text
    assert "grids does not run here (RuntimeError: out of registers)" in caplog.text


def test_wide_groups_have_no_kernel() -> None:
    assert not trials.products_agree(256, "cpu")
