"""`quantize --target-size` and `--target-kl` on a tiny model: what is written, that limits hold, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantmill.checkpoint import open_checkpoint
from quantmill.cli import main
from quantmill.commands.choosing import Target, choose_bits, parse_target
from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.hub.card_facts import read_branch
from quantmill.hub.card_sections import provided_files
from quantmill.quantize import calibration, pipeline
from quantmill.quantize.job import Job
from quantmill.quantize.sensitivity import sensitivities
from quantmill.types import CalibrationSet, QuantConfig, Variant
from tiny_models import TEXT, byte_level_tokenizer, tiny_model

BASE = QuantConfig(bits=4, group_size=32)


def job(tmp_path: Path, **changes) -> Job:
    folder = tmp_path / "src"
    if not folder.exists():
        tiny_model("llama").half().save_pretrained(folder)
        byte_level_tokenizer().save_pretrained(folder)
    blocks = torch.randint(0, 300, (10, 16), generator=torch.Generator().manual_seed(0))
    data = CalibrationSet(blocks, "made up", 0, calibration.fingerprint(blocks), 10, 0)
    return Job(folder, "tiny", tmp_path / "out", (Variant("x", BASE),), data, **changes)


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_a_mixed_folder_is_written_within_its_size_and_read_back(preset: str, tmp_path: Path) -> None:
    task = job(tmp_path, preset=preset)
    target = Target(size=157_000, text="157KB")
    mix = choose_bits(task, BASE, target, Console(False))
    assert len(mix.bits) > 1
    [done] = pipeline.quantize(
        Job(task.source, "tiny", task.out, (mix.variant,), task.calibration, preset=preset), lambda _: None
    )
    assert done.size_bytes <= target.size
    assert done.size_bytes > 0.85 * target.size
    quant = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert len(quant["dynamic"]) == len(mix.variant.dynamic)
    checkpoint = open_checkpoint(done.folder)
    for module in checkpoint.quantized_modules():
        assert checkpoint.module_config(module).bits == mix.variant.config_of(module).bits
        assert checkpoint.packed(module).bits == mix.variant.config_of(module).bits
    for layer in range(2):  # readers fuse q, k, v and gate, up
        for fused in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            assert len({mix.variant.config_of(f"model.layers.{layer}.{m}") for m in fused}) == 1
    assert not (task.out / ".quantmill-choosing").exists()


def test_less_loss_takes_more_bits(tmp_path: Path) -> None:
    task = job(tmp_path)
    loose = choose_bits(task, BASE, Target(kl=1e-3, text="a"), Console(False))
    tight = choose_bits(task, BASE, Target(kl=1e-4, text="b"), Console(False))
    assert loose.predicted_kl <= 1e-3
    assert tight.predicted_kl <= 1e-4

    def bits(mix) -> int:
        return sum(b * n for b, n in mix.bits.items())

    assert bits(tight) > bits(loose)


def test_sensitivities_leave_the_model_as_it_was() -> None:
    model = tiny_model("llama").requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    parts = {"a": ["model.layers.0.self_attn.o_proj"], "b": ["model.layers.1.mlp.down_proj"]}
    zero = lambda m: torch.zeros_like(before[f"{m}.weight"])  # noqa: E731
    alone, together = sensitivities(model, rows, parts, zero)
    assert min(alone.values()) > 0
    assert together > max(alone.values())
    same = lambda m: before[f"{m}.weight"]  # noqa: E731
    assert sensitivities(model, rows, parts, same)[1] == pytest.approx(0, abs=1e-7)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("text", "size"), [("4.2GB", 4_200_000_000), ("900 mb", 900_000_000), ("3GiB", 3 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    target = parse_target(text, None)
    assert target is not None
    assert target.size == size


def test_refusals(tmp_path: Path) -> None:
    for text in ("much", "-3GB", "4.2.1GB", "4XB"):
        with pytest.raises(BadRequest, match="no size"):
            parse_target(text, None)
    with pytest.raises(BadRequest, match="one of them"):
        parse_target("1GB", 0.1)
    with pytest.raises(BadRequest, match="positive"):
        parse_target(None, -1)
    assert parse_target(None, None) is None
    with pytest.raises(BadRequest, match="alone take"):
        choose_bits(job(tmp_path), BASE, Target(size=1000, text="1KB"), Console(False))


def test_the_command_line_chooses_and_the_card_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = job(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([TEXT * 3] * 20))
    words = ["--dataset", text, "--samples", 8, "--seqlen", 16, "--bits", 4, "--group-size", 32]
    words += ["--target-size", "157KB", "--out", task.out, "--json", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["quantmill", "quantize", str(task.source), *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    [made] = json.loads(capsys.readouterr().out)["variants"]
    assert made["branch"] == "gptq-mixed-157KB-32g"
    assert made["size_bytes"] <= 157_000
    facts = read_branch(Path(made["folder"]))
    assert len(facts.modules_by_bits) > 1
    assert sum(facts.modules_by_bits.values()) == 14
    listed = ", ".join(f"{b} ({n} linears)" for b, n in facts.modules_by_bits.items())
    assert listed in provided_files([facts])
