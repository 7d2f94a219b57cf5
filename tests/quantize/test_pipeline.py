"""The making lane on tiny models: what is written, resuming after a kill, variants together and alone, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptq_models import FAMILIES
from quantmill.architectures import ARCHITECTURES, linear_shapes
from quantmill.checkpoint import open_checkpoint
from quantmill.errors import BadCheckpoint, BadRequest, CannotResume
from quantmill.formats.gptq import dequantize as dequantize_packed
from quantmill.hub.variants import parse_variant
from quantmill.quantize import calibration, pipeline
from quantmill.quantize.job import BlockFinished, Finished, Job, ModuleSolved
from quantmill.quantize.pipeline import calibration_rows
from quantmill.quantize.plan import size_bytes
from quantmill.types import CalibrationSet, QuantConfig
from tiny_models import byte_level_tokenizer, tiny_model


def tokens(samples: int = 8, seqlen: int = 16, seed: int = 0) -> CalibrationSet:
    blocks = torch.randint(0, 300, (samples, seqlen), generator=torch.Generator().manual_seed(seed))
    return CalibrationSet(blocks, "made up", seed, calibration.fingerprint(blocks), samples, 0)


def source(folder: Path, model_type: str = "llama", **settings) -> Path:
    tiny_model(model_type, **{**FAMILIES[model_type], **settings}).half().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def job(folder: Path, out: Path, *variants: str, **changes) -> Job:
    chosen = tuple(parse_variant(v) for v in variants or ("4bit-32g",))
    return Job(source=folder, source_name="tiny", out=out, variants=chosen, calibration=tokens(), **changes)


def run(task: Job) -> tuple[list[Finished], list[object]]:
    events: list[object] = []
    return pipeline.quantize(task, events.append), events


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_a_complete_folder(model_type: str, tmp_path: Path) -> None:
    done, events = run(
        job(source(tmp_path / "src", model_type), tmp_path / "out", "4bit-32g", "8bit--1g", "3bit-32g-asym")
    )
    assert [f.branch for f in done] == [
        "gptq-4bit-32g-actorder_True",
        "gptq-8bit--1g-actorder_True",
        "gptq-3bit-32g-actorder_True-asym",
    ]
    modules = len(ARCHITECTURES[model_type].modules) * 2
    assert sum(isinstance(e, ModuleSolved) for e in events) == 3 * modules
    assert sum(isinstance(e, BlockFinished) for e in events) == 6
    original = load_file(tmp_path / "src" / "model.safetensors")
    for f in done:
        checkpoint = open_checkpoint(f.folder)
        assert len(checkpoint.quantized_modules()) == modules == len(f.modules)
        assert f.size_bytes == pytest.approx(
            size_bytes(checkpoint.config, checkpoint.quant_config), rel=0.02, abs=4000
        )
        names = {p.name for p in f.folder.iterdir()}
        assert {
            "config.json",
            "quantize_config.json",
            "tokenizer.json",
            "generation_config.json",
            "quantize_report.json",
        } <= names
        assert (
            json.loads((f.folder / "quantize_config.json").read_text())
            == checkpoint.config["quantization_config"]
        )
        for name in checkpoint.quantized_modules():
            W = original[f"{name}.weight"].float()
            error = (dequantize_packed(checkpoint.packed(name), torch.float32) - W).norm() / W.norm()
            assert error < {4: 0.25, 8: 0.03, 3: 0.45}[checkpoint.quant_config.bits]
            bias = linear_shapes(checkpoint.config)[name.split(".", 3)[3]].bias
            assert (f"{name}.bias" in checkpoint.tensors) == bias
        kept = [n for n in original if n in checkpoint.tensors]
        assert "model.embed_tokens.weight" in kept
        for name in kept:
            assert torch.equal(checkpoint.load(name), original[name]), name
    assert not (tmp_path / "out" / ".quantmill-work").exists()


def test_variants_made_together_are_those_made_alone(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    together, _ = run(job(src, tmp_path / "both", "4bit-32g", "2bit-16g-asym", "8bit-32g"))
    for f, name in zip(together, ("4bit-32g", "2bit-16g-asym", "8bit-32g"), strict=True):
        alone, _ = run(job(src, tmp_path / name, name))
        assert (f.folder / "model.safetensors").read_bytes() == (
            alone[0].folder / "model.safetensors"
        ).read_bytes()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    done, _ = run(job(source(tmp_path / "src", tie_word_embeddings=True), tmp_path / "out"))
    checkpoint = open_checkpoint(done[0].folder)
    assert checkpoint.config["tie_word_embeddings"]
    assert "lm_head.weight" not in checkpoint.tensors


def test_true_sequential_changes_later_groups_only(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    task = job(src, tmp_path / "seq", "2bit-32g")
    plain = dataclasses.replace(
        task.variants[0], config=dataclasses.replace(task.variants[0].config, true_sequential=False)
    )
    first, _ = run(task)
    second, _ = run(dataclasses.replace(task, out=tmp_path / "par", variants=(plain,)))
    a, b = (load_file(f[0].folder / "model.safetensors") for f in (first, second))
    assert torch.equal(
        a["model.layers.0.self_attn.q_proj.qweight"], b["model.layers.0.self_attn.q_proj.qweight"]
    )
    assert not torch.equal(
        a["model.layers.0.mlp.down_proj.qweight"], b["model.layers.0.mlp.down_proj.qweight"]
    )


def test_an_even_share_of_rows_at_eight_bits() -> None:
    blocks = torch.arange(40).view(20, 2)
    assert torch.equal(calibration_rows(blocks, QuantConfig(bits=4)), blocks)
    assert calibration_rows(blocks, QuantConfig(bits=8))[:, 0].tolist() == [0, 20]
    assert len(calibration_rows(blocks[:1], QuantConfig(bits=8))) == 1


class Stop(Exception):
    """What a test raises to interrupt a run."""


def interrupt_after(blocks: int):
    def on_event(event: object) -> None:
        nonlocal blocks
        blocks -= isinstance(event, BlockFinished)
        if blocks == 0:
            raise Stop

    return on_event


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_resume_ends_with_the_same_bytes(blocks: int, tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    variants = ("4bit-32g", "3bit-32g-grouped")
    whole, _ = run(job(src, tmp_path / "whole", *variants))
    with pytest.raises(Stop):
        pipeline.quantize(job(src, tmp_path / "out", *variants), interrupt_after(blocks))
    done, events = run(job(src, tmp_path / "out", *variants, resume=True))
    assert sum(isinstance(e, BlockFinished) and e.resumed for e in events) == blocks
    for a, b in zip(whole, done, strict=True):
        assert (a.folder / "model.safetensors").read_bytes() == (b.folder / "model.safetensors").read_bytes()
        assert [m.name for m in a.modules] == [m.name for m in b.modules]


def test_what_an_earlier_run_finished_is_told_again(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    run(job(src, tmp_path / "out", "4bit-32g"))
    done, events = run(job(src, tmp_path / "out", "4bit-32g", "8bit-32g", resume=True))
    assert [e.branch for e in events if isinstance(e, Finished)] == [f.branch for f in done]
    assert not any(isinstance(e, ModuleSolved) and e.branch == done[0].branch for e in events)


KILLED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_pipeline import job
from quantmill.quantize import pipeline
def slow(event):
    import time
    print(type(event).__name__, flush=True)
    time.sleep(0.05)
pipeline.quantize(job(Path({src!r}), Path({out!r}), "4bit-32g", "8bit-32g", resume=True), slow)
"""


def test_killed_at_any_moment_it_resumes(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    tests = Path(__file__).parents[1]
    code = KILLED.format(paths=[str(tests), str(tests / "quantize")], src=str(src), out=str(out))
    for lines in (3, 10, 20):  # kill -9 after so many events
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    done, _ = run(job(src, out, "4bit-32g", "8bit-32g", resume=True))
    whole, _ = run(job(src, tmp_path / "whole", "4bit-32g", "8bit-32g"))
    for a, b in zip(whole, done, strict=True):
        assert (a.folder / "model.safetensors").read_bytes() == (b.folder / "model.safetensors").read_bytes()
    assert not (out / ".quantmill-work").exists()


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    run(job(src, out))
    with pytest.raises(BadRequest, match="--resume"):
        run(job(src, out))
    began = time.perf_counter()
    done, events = run(job(src, out, resume=True))
    assert not any(isinstance(e, ModuleSolved) for e in events), time.perf_counter() - began
    assert len(done[0].modules) == 14
    other = dataclasses.replace(job(src, out, resume=True), calibration=tokens(seed=1))
    with pytest.raises(BadRequest, match="another source, data set or setting"):
        run(other)


def test_an_unfinished_run_of_another_kind_is_not_mixed_in(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    with pytest.raises(Stop):
        pipeline.quantize(job(src, out), interrupt_after(1))
    with pytest.raises(CannotResume, match="--resume"):
        run(job(src, out))
    with pytest.raises(CannotResume, match="another source, data set or setting"):
        run(dataclasses.replace(job(src, out, resume=True), calibration=tokens(seed=1)))


def test_a_damaged_block_file_is_named(tmp_path: Path) -> None:
    src, out = source(tmp_path / "src"), tmp_path / "out"
    with pytest.raises(Stop):
        pipeline.quantize(job(src, out), interrupt_after(1))
    block = next((out / ".quantmill-work").glob("*/block-*.safetensors"))
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(CannotResume, match=r"block-00000\.safetensors is damaged"):
        run(job(src, out, resume=True))


def test_nan_in_the_source_is_named_and_nothing_half_made_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.half().save_pretrained(tmp_path / "src")
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.gate_proj: the weights hold NaN"):
        run(job(tmp_path / "src", tmp_path / "out"))
    assert not (tmp_path / "out" / "gptq-4bit-32g-actorder_True").exists()


def test_weights_too_large_for_float16_keep_their_type(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.model.norm.weight.data[0] = 1e6
    model.save_pretrained(tmp_path / "src")
    done, _ = run(job(tmp_path / "src", tmp_path / "out"))
    checkpoint = open_checkpoint(done[0].folder)
    assert checkpoint.load("model.norm.weight").dtype == torch.bfloat16
    assert checkpoint.load("model.embed_tokens.weight").dtype == torch.float16
