"""Repositories on disk for the tests of the hub lane."""

from __future__ import annotations

import pytest

from branch_folders import eval_report, modules, quantize_report, write_branch
from quantmill.hub.variants import CARD_GRID
from quantmill.types import QuantConfig

LOSSES = (0.0312, 0.0221, 0.00051, 0.00043)


@pytest.fixture
def make_branch(tmp_path):
    """make_branch(name, config, report=..., evaluation=..., check=...) writes a branch folder."""

    def make(name, config=None, **files):
        return write_branch(tmp_path / "out" / name, config or QuantConfig(), **files)

    return make


@pytest.fixture
def repository(make_branch):
    """The four branches of the card grid, made and measured; the folder they are in."""
    for variant, loss in zip(CARD_GRID, LOSSES, strict=True):
        reports = modules(variant.config, loss / 10)
        report = quantize_report(variant.branch, variant.config, reports)
        evaluation = eval_report(loss, 5.25 * (1 + loss))
        folder = make_branch(variant.branch, variant.config, report=report, evaluation=evaluation)
    return folder.parent
