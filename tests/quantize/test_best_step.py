"""Preset best in the pipeline: complete folders, resuming to the same bytes, training that is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptq_models import FAMILIES
from quantmill.architectures import ARCHITECTURES
from quantmill.checkpoint import open_checkpoint
from quantmill.errors import BadRequest
from quantmill.hub.variants import parse_variant
from quantmill.quantize import best_step, calibration, pipeline, tuning
from quantmill.quantize.best_step import lane_rows
from quantmill.quantize.block_tuning import TunedBlock
from quantmill.quantize.job import BlockFinished, Job
from quantmill.quantize.presets import Schedule, recipe_of, refuse_unknown
from quantmill.types import CalibrationSet, QuantConfig, Variant
from tiny_models import byte_level_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in a few steps; its real schedules are presets'."""
    few = dict.fromkeys((2, 3, 4), Schedule(steps=3, rate=1e-2, norm_rate=1e-2))
    monkeypatch.setattr(best_step, "TUNE", few)
    monkeypatch.setattr(best_step, "DISTILL", {bits: (s,) for bits, s in few.items()})


def source(folder: Path, model_type: str = "llama") -> Path:
    tiny_model(model_type, **FAMILIES[model_type]).half().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def job(folder: Path, out: Path, variant: str = "3bit-32g", **changes) -> Job:
    blocks = torch.randint(0, 300, (12, 16), generator=torch.Generator().manual_seed(0))
    data = CalibrationSet(blocks, "made up", 0, calibration.fingerprint(blocks), 12, 0)
    chosen = (parse_variant(variant),)
    return Job(folder, "tiny", out, chosen, data, **{"preset": "best", **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_every_family_gets_choices_in_its_report(model_type: str, tmp_path: Path) -> None:
    [done] = pipeline.quantize(job(source(tmp_path / "src", model_type), tmp_path / "out"), lambda _: None)
    known = json.loads((done.folder / "quantize_report.json").read_text())
    assert known["preset"] == "best"
    assert all("damp" in m["choice"] and "shift" in m["choice"] for m in known["modules"])
    checkpoint = open_checkpoint(done.folder)
    assert len(checkpoint.quantized_modules()) == len(known["modules"])


def test_what_distillation_changes_is_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path / "src")
    [plain] = pipeline.quantize(job(folder, tmp_path / "plain"), lambda _: None)
    real, rows = best_step.distill, []

    def doubled(*arguments, **options) -> TunedBlock:
        rows.append(arguments[3])
        done = real(*arguments, **options)
        linears = {n: dataclasses.replace(q, scales=q.scales * 2) for n, q in done.linears.items()}
        return TunedBlock(linears, {n: w * 0.5 for n, w in done.norms.items()}, done.tuned)

    monkeypatch.setattr(best_step, "distill", doubled)
    monkeypatch.setattr(best_step, "OWN_TEXT", {3: 2})
    monkeypatch.setattr(tuning, "LOOK", 100)
    none = dict.fromkeys((2, 3, 4), Schedule(steps=0, rate=0.0, norm_rate=0.0))
    monkeypatch.setattr(best_step, "DISTILL", {bits: (s,) for bits, s in none.items()})
    [trained] = pipeline.quantize(job(folder, tmp_path / "trained", distill=True), lambda _: None)
    a, b = weights(plain.folder), weights(trained.folder)
    assert a.keys() == b.keys()
    for name in a:
        factor = 2.0 if name.endswith(".scales") else 0.5 if name.endswith("norm.weight") else 1
        assert torch.equal(a[name] * factor, b[name]), name
    report = json.loads((trained.folder / "quantize_report.json").read_text())
    assert all("distilled" in m["choice"] for m in report["modules"])
    given = job(folder, tmp_path / "plain").calibration.blocks
    assert torch.equal(rows[0][-len(given) :], given), "what judges is what was given"
    assert len(rows[0]) == len(given) + 2 * (len(given) - 1)


class Stop(Exception):
    """Ends a run after its first block."""


@pytest.mark.parametrize("extra", [{}, {"tune_blocks": True, "distill": True}], ids=["plain", "trained"])
def test_a_resumed_run_ends_with_the_same_bytes(extra: dict, tmp_path: Path) -> None:
    folder = source(tmp_path / "src")
    [whole] = pipeline.quantize(job(folder, tmp_path / "whole", **extra), lambda _: None)

    def stop(event: object) -> None:
        if isinstance(event, BlockFinished):
            raise Stop

    with pytest.raises(Stop):
        pipeline.quantize(job(folder, tmp_path / "parts", **extra), stop)
    again = dataclasses.replace(job(folder, tmp_path / "parts", **extra), resume=True)
    [resumed] = pipeline.quantize(again, lambda _: None)
    a, b = weights(whole.folder), weights(resumed.folder)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_eight_bits_skip_what_cannot_pay() -> None:
    assert not recipe_of("best", Variant("x", QuantConfig(bits=8))).two_streams
    assert recipe_of("best", Variant("x", QuantConfig(bits=4))).two_streams


def test_refusals() -> None:
    with pytest.raises(BadRequest, match="no preset 'slow'"):
        refuse_unknown("slow", trained=False)
    with pytest.raises(BadRequest, match="need --preset best"):
        refuse_unknown("fast", trained=True)
    refuse_unknown("best", trained=True)


def test_lanes_leave_something_to_hold_out() -> None:
    assert lane_rows(64, 8) == 6
    assert lane_rows(3, 8) == 1
    assert lane_rows(1000, 8) == 8
