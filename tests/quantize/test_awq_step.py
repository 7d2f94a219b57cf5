"""AWQ from a source: folded scales leave the model's function alone, rounding is the solver's, bytes repeat."""

import json
from pathlib import Path

import pytest
import torch

from quantmill.checkpoint import open_checkpoint
from quantmill.errors import UnsupportedModel
from quantmill.formats.dialects import Layout
from quantmill.formats.gptq import dequantize
from quantmill.quantize import awq_step, calibration
from quantmill.quantize.awq_scales import STRENGTHS, aware_scales, exact_scales, pivots, said
from quantmill.quantize.awq_step import solve_scaled
from quantmill.quantize.job import Job
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


def make(source: Path, out: Path, variant: Variant = VARIANT, resume: bool = False) -> Path:
    blocks = torch.randint(0, 320, (4, 64), generator=torch.Generator().manual_seed(1))
    data = CalibrationSet(blocks, "random", 0, calibration.fingerprint(blocks), 4, 0)
    return quantize(Job(source, "some/Model", out, (variant,), data, resume=resume), lambda _: None)[0].folder


def test_an_awq_folder_comes_out_and_runs(source: Path, tmp_path: Path) -> None:
    from quantmill.runtime.load import load_model

    folder = make(source, tmp_path)
    opened = open_checkpoint(folder)
    assert opened.layout is Layout.AWQ
    assert len(opened.quantized_modules()) == 14
    report = json.loads((folder / "quantize_report.json").read_text())
    assert any("strength 0." in m["choice"] for m in report["modules"]), "no scaling was ever chosen"
    ids = torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        got = load_model(folder, device="cpu")(ids).logits.log_softmax(-1)
        wanted = load_model(source, device="cpu")(ids).logits.log_softmax(-1)
    assert float((wanted.exp() * (wanted - got)).sum(-1).mean()) < 0.05


def test_folding_divides_exactly_what_the_weights_were_multiplied_by(source: Path, tmp_path: Path) -> None:
    """norm * W in the file is the source's product, up to the rounding of the codes."""
    folder = make(source, tmp_path)
    new, old = open_checkpoint(folder), open_checkpoint(source)
    name = "model.layers.0.input_layernorm.weight"
    before, after = old.load(name).float(), new.load(name).float()
    assert not torch.equal(before, after)
    module = "model.layers.0.self_attn.q_proj"
    W = old.load(f"{module}.weight").float() * before
    Q = dequantize(new.packed(module), torch.float32) * after
    assert float((W - Q).norm() / W.norm()) < 0.12


def test_a_resumed_run_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(source, tmp_path / "whole")
    solve, calls = awq_step.AwqStep.solve, []

    def dies_at_the_second(self, on_event):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(self, on_event)

    monkeypatch.setattr(awq_step.AwqStep, "solve", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut")
    monkeypatch.undo()
    resumed = make(source, tmp_path / "cut", resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_scaling_is_kept_only_where_it_pays() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2000, 64, generator=generator)
    x[:, ::9] *= 20
    W, H = torch.randn(32, 64, generator=generator), x.T @ x / len(x)
    cost = pivots(H, CONFIG)
    candidates = [(said(a, power), aware_scales([W], cost, a, power)) for a, power in STRENGTHS]
    best, plain = solve_scaled([W], H, candidates, CONFIG), solve_scaled([W], H, [], CONFIG)
    assert best.loss <= plain.loss
    assert plain.scales is None


def test_scales_that_fold_into_float16_are_exact() -> None:
    norm, wanted = torch.rand(64) + 0.5, torch.rand(64) * 3 + 0.2
    s = exact_scales(norm, wanted)
    stored = (norm / s).half().float()
    torch.testing.assert_close(stored * s, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(s, wanted, rtol=1e-3, atol=0)
    norm[3] = 0
    assert float(exact_scales(norm, wanted)[3]) == 1


def test_sizes_that_do_not_fit_are_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    bad = Variant("awq", QuantConfig(4, 40, sym=False), "awq")
    with pytest.raises(
        UnsupportedModel, match="groups of 40 do not divide its 64 inputs: use --group-size 64"
    ):
        make(source, tmp_path, bad)
