"""The main job on a real model: SmolLM2 as a Mistral-type model, cut to three blocks; the demo marked slow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from quantmill import demo
from quantmill.checkpoint import open_checkpoint
from quantmill.commands.making import Request, make
from quantmill.console import Console
from quantmill.doctor import check
from quantmill.evaluate import evaluate
from quantmill.hub.variants import CARD_GRID, parse_variant
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.types import Variant

pytestmark = pytest.mark.model


def request(source: Path, out: Path, *variants: Variant) -> Request:
    return Request(
        source=str(source),
        out=out,
        variants=variants,
        dataset="python-docs",
        seqlen=256,
        samples=16,
        seed=0,
        preset="fast",
        resume=False,
        device="cpu",
        threads=None,
        command="a test",
    )


def test_the_four_branches(smol_cut: Path, tmp_path: Path) -> None:
    made = make(request(smol_cut, tmp_path, *CARD_GRID), Console())
    folders = {f.branch: f.folder for f in made.variants}
    assert list(folders) == [v.branch for v in CARD_GRID]
    assert (tmp_path / "loss_by_layer.png").stat().st_size > 1000
    ids = torch.tensor(load_tokenizer(smol_cut)(Path(__file__).read_text() * 2)["input_ids"])
    models = {branch: load_model(folder, device="cpu") for branch, folder in folders.items()}
    reports = evaluate(models, ids, original=load_model(smol_cut, device="cpu"), ctx=256, windows=4)
    kl = {branch: r.mean_kl for branch, r in reports.items()}
    assert all(check(folder).ok for folder in folders.values())
    main, fine, eight, finest = (kl[v.branch] for v in CARD_GRID)
    assert None not in (main, fine, eight, finest)
    assert main > fine > 10 * max(eight, finest)  # type: ignore[operator, type-var]
    assert reports["main"].top1_agreement > 0.8  # type: ignore[operator]
    for branch, folder in folders.items():
        assert open_checkpoint(folder).config["sliding_window"] == 4096
        report = json.loads((folder / "quantize_report.json").read_text())
        assert report["fallbacks"] == []
        assert report["calibration"]["samples"] == (2 if "8bit" in branch else 16)


@pytest.mark.parametrize("variant", ["2bit-64g-asym", "3bit-128g-grouped", "4bit--1g-noact"])
def test_other_settings(variant: str, smol_cut: Path, tmp_path: Path) -> None:
    made = make(request(smol_cut, tmp_path, parse_variant(variant)), Console())
    folder = made.variants[0].folder
    assert check(folder).ok
    losses = [m.loss for m in made.variants[0].modules]
    assert len(losses) == 21
    assert max(losses) < {"2": 0.3, "3": 0.08, "4": 0.03}[variant[0]]


@pytest.mark.slow
def test_the_demo(tmp_path: Path, smol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, on a third of its tokens: minutes instead of five."""
    monkeypatch.setattr(demo, "SAMPLES", 24)
    monkeypatch.setattr(demo, "PROTOCOL", dataclasses.replace(demo.PROTOCOL, windows=4))
    result = demo.run(tmp_path / "demo", None, Console(as_json=True))
    assert list(result["branches"]) == [v.branch for v in CARD_GRID]
    kl = [b["mean_kl"] for b in result["branches"].values()]
    assert kl[0] < 0.2
    assert max(kl[2:]) < 0.005
    assert all("Paris" in b["answer"] for b in result["branches"].values())
    card = Path(result["card"]).read_text()
    assert all(branch in card for branch in result["branches"])
    assert (Path(result["card"]).parent / "loss_by_size.png").exists()
