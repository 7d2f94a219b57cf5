"""A run that starts its batches again for every group, for lack of memory, ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantize.test_best_step import job, source, weights
from quantmill.quantize import pipeline
from quantmill.quantize.memory import RESIDENCES, Residence

RERUN = next(r for r in RESIDENCES if not r.waiting)


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_starting_again_changes_nothing(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "src", "qwen2")
    [waited] = pipeline.quantize(job(folder, tmp_path / "waited", preset=preset), lambda _: None)
    asked: list[Residence] = []

    def frugal(*_: object, **__: object) -> Residence:
        asked.append(RERUN)
        return RERUN

    monkeypatch.setattr(pipeline, "choose", frugal)
    [again] = pipeline.quantize(job(folder, tmp_path / "again", preset=preset), lambda _: None)
    assert asked
    a, b = weights(waited.folder), weights(again.folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
