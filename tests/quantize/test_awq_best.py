"""AWQ under preset best: both streams, scales and channels chosen on held-out tokens, exact folding, same bytes."""

import json
from pathlib import Path

import pytest
import torch

from quantmill.checkpoint import open_checkpoint
from quantmill.quantize import awq_best, calibration
from quantmill.quantize.awq_best import refit_channels, scaled
from quantmill.quantize.job import Job
from quantmill.quantize.moments import Goal
from quantmill.quantize.pipeline import quantize
from quantmill.types import CalibrationSet, CheckpointFormat, QuantConfig, Variant
from tiny_models import byte_level_tokenizer, tiny_model

CONFIG = QuantConfig(4, 32, sym=False, checkpoint_format=CheckpointFormat.GPTQ_V2)
VARIANT = Variant("awq", CONFIG, "awq")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some channels of the norms are large, as in real models: there is something to be aware of."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model("qwen2")
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[::7] *= 8
    model.half().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def make(source: Path, out: Path, preset: str = "best", resume: bool = False) -> Path:
    blocks = torch.randint(0, 320, (12, 48), generator=torch.Generator().manual_seed(1))
    data = CalibrationSet(blocks, "random", 0, calibration.fingerprint(blocks), 12, 0)
    job = Job(source, "some/Model", out, (VARIANT,), data, preset, resume=resume)
    return quantize(job, lambda _: None)[0].folder


def divergence(folder: Path, source: Path) -> float:
    from quantmill.runtime.load import load_model

    ids = torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        got = load_model(folder, device="cpu")(ids).logits.log_softmax(-1)
        wanted = load_model(source, device="cpu")(ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def test_both_streams_are_used_and_what_is_written_runs(source: Path, tmp_path: Path) -> None:
    best, fast = make(source, tmp_path / "best"), make(source, tmp_path / "fast", "fast")
    report = json.loads((best / "quantize_report.json").read_text())
    said = [m["choice"] for m in report["modules"]]
    assert all("activation-aware" in s and "refinements" in s for s in said)
    assert any("strength 0." in s for s in said), "no scaling was ever chosen"
    assert divergence(best, source) < 1.5 * divergence(fast, source) < 0.1


def test_norms_hold_what_the_weights_were_multiplied_by(source: Path, tmp_path: Path) -> None:
    """norm * W in the file is near the source's product."""
    folder = make(source, tmp_path)
    new, old = open_checkpoint(folder), open_checkpoint(source)
    from quantmill.formats.gptq import dequantize

    for norm, module in (
        ("input_layernorm", "self_attn.v_proj"),
        ("post_attention_layernorm", "mlp.up_proj"),
    ):
        before, after = (o.load(f"model.layers.0.{norm}.weight").float() for o in (old, new))
        W = old.load(f"model.layers.0.{module}.weight").float() * before
        Q = dequantize(new.packed(f"model.layers.0.{module}"), torch.float32) * after
        assert float((W - Q).norm() / W.norm()) < 0.2


def test_a_resumed_run_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(source, tmp_path / "whole")
    solve, calls = awq_best.AwqBestStep.solve, []

    def dies_at_the_second(self, on_event):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(self, on_event)

    monkeypatch.setattr(awq_best.AwqBestStep, "solve", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut")
    monkeypatch.undo()
    resumed = make(source, tmp_path / "cut", resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def a_goal(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, Goal]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator)
    W, H = torch.randn(rows, columns, generator=generator), x.T @ x / len(x)
    return W, Goal(H, W @ H, len(x))


def test_a_scaled_goal_has_the_same_loss() -> None:
    W, goal = a_goal(16, 32, 0)
    s = torch.rand(32) + 0.5
    torch.testing.assert_close(scaled(goal, s).loss(W * s), goal.loss(W), rtol=1e-4, atol=1e-4)


def test_refitted_channels_find_scales_that_were_lost() -> None:
    W, goal = a_goal(64, 32, 1)
    lost = torch.rand(32) * 0.8 + 0.6  # within the reach
    found = refit_channels(W * lost, goal, torch.ones(32))
    torch.testing.assert_close(found, lost, rtol=0.05, atol=0)
    assert float(goal.loss(W * lost / found).sum()) < float(goal.loss(W * lost).sum())


def test_channels_that_say_nothing_stay() -> None:
    _, goal = a_goal(8, 16, 2)
    scales = torch.rand(16) + 0.5
    torch.testing.assert_close(refit_channels(torch.zeros(8, 16), goal, scales), scales)
