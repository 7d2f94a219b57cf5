"""A run that starts its batches again for every group, for lack of memory, ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantize.test_best_step import job, source, weights
from quantmill.errors import BadRequest
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


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_that_runs_out_is_named_with_a_cure(
    raised: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(pipeline, "_quantize_block", fail)
    with pytest.raises(BadRequest, match=r"memory ran out within what is free .*go on with --resume"):
        pipeline.quantize(job(source(tmp_path / "src", "llama"), tmp_path / "out"), lambda _: None)


def test_other_errors_of_torch_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipeline, "_quantize_block", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pipeline.quantize(job(source(tmp_path / "src", "llama"), tmp_path / "out"), lambda _: None)
