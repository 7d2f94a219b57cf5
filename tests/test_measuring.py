"""`quantmill eval`: one variant beside another, and tasks through lm-eval's own interface."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from quantmill.commands import measuring
from quantmill.commands.tasks import run_tasks, task_lines
from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.hub.variants import parse_variant
from quantmill.quantize import calibration, pipeline
from quantmill.quantize.job import Job
from quantmill.types import CalibrationSet
from tiny_models import TEXT, byte_level_tokenizer, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, and in out two variants of it."""
    root = tmp_path_factory.mktemp("measuring")
    tiny_model("llama").half().save_pretrained(root / "src")
    byte_level_tokenizer().save_pretrained(root / "src")
    blocks = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    data = CalibrationSet(blocks, "made up", 0, calibration.fingerprint(blocks), 8, 0)
    variants = (parse_variant("2bit-32g"), parse_variant("8bit-32g"))
    pipeline.quantize(Job(root / "src", "tiny", root / "out", variants, data), lambda _: None)
    (root / "text.txt").write_text(" ".join([TEXT] * 40))
    return root


def variant(root: Path, bits: int) -> str:
    return str(root / "out" / f"gptq-{bits}bit-32g-actorder_True")


def test_versus_is_paired_and_kept_in_both_folders(folders: Path) -> None:
    coarse, fine = variant(folders, 2), variant(folders, 8)
    protocol = measuring.Protocol(str(folders / "text.txt"), 32, 12, "cpu")
    reports, found = measuring.versus(coarse, fine, str(folders / "src"), protocol, Console(False))
    assert found.kl_ratio is not None
    assert found.kl_ratio.value == pytest.approx(reports[coarse].mean_kl / reports[fine].mean_kl)
    assert found.kl_ratio.low > 1
    for name in (coarse, fine):
        kept = json.loads((Path(name) / measuring.EVAL_REPORT).read_text())
        assert kept["mean_kl"] == reports[name].mean_kl
        assert len(kept["top1_agreement_ci"]) == 2
    lines = "\n".join(measuring.report_lines(reports[coarse]) + measuring.versus_lines(fine, found))
    assert "ratio" in lines
    assert "versus" in lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_gpu_gives_the_cpus_statistics(folders: Path) -> None:
    here, there = (
        measuring.measure(
            {"made": variant(folders, 2)},
            str(folders / "src"),
            measuring.Protocol(str(folders / "text.txt"), 32, 12, device, save=False),
            Console(False),
        )["made"]
        for device in ("cpu", "cuda")
    )
    assert there.tokens == here.tokens
    assert there.perplexity == pytest.approx(here.perplexity, rel=2e-3)
    for name in ("mean_kl", "median_kl", "p99_kl", "p999_kl", "max_kl", "rms_delta_p"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=0.03)
    assert there.top1_agreement == pytest.approx(here.top1_agreement, abs=0.02)


@pytest.fixture
def branch(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(variant(folders, 8), tmp_path / "branch"))


def told(branch: Path, folders: Path, capsys: pytest.CaptureFixture[str], against: str | None) -> str:
    """Measure; what was said on stderr."""
    protocol = measuring.Protocol(str(folders / "text.txt"), 32, 2, "cpu")
    capsys.readouterr()
    measuring.measure({"it": str(branch)}, against, protocol, Console(False))
    return capsys.readouterr().err


def test_a_report_with_kl_is_not_replaced_by_one_without(
    branch: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(branch, folders, capsys, str(folders / "src"))
    before = (branch / measuring.EVAL_REPORT).read_text()
    assert "stays" in told(branch, folders, capsys, None)
    assert (branch / measuring.EVAL_REPORT).read_text() == before


def test_a_report_that_cannot_be_kept_is_still_told(
    branch: Path, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "eval_report.json")

    (branch / measuring.EVAL_REPORT).unlink(missing_ok=True)
    monkeypatch.setattr(measuring, "write_json", refuse)
    assert "Read-only file system" in told(branch, folders, capsys, None)


def test_the_shared_cache_stays_as_the_hub_sent_it(
    branch: Path, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(branch.parent))
    (branch / measuring.EVAL_REPORT).unlink(missing_ok=True)
    told(branch, folders, capsys, None)
    assert not (branch / measuring.EVAL_REPORT).exists()


def test_a_model_is_not_compared_with_itself(folders: Path) -> None:
    protocol = measuring.Protocol(str(folders / "text.txt"), 32, 12, "cpu")
    with pytest.raises(BadRequest, match="the model itself"):
        measuring.versus("a", "a", None, protocol, Console(False))


def test_tasks_without_lm_eval_say_what_to_install(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadRequest, match=r"pip install 'quantmill\[tasks\]'"):
        run_tasks([variant(folders, 8)], "arc_easy", "cpu", Console(False))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Modules with lm-eval 0.4's names and signatures: what they are called with, two tasks known."""
    calls: list[dict] = []

    def simple_evaluate(*, model, tasks, task_manager, bootstrap_iters):
        calls.append({"model": model, "tasks": tasks})
        metrics = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": dict.fromkeys(tasks, metrics)}

    def manager(include_path=()):
        return SimpleNamespace(all_tasks=["arc_easy", "piqa", *("mine" for _ in include_path)])

    class HFLM:
        def __init__(self, *, pretrained, tokenizer):
            self.pretrained, self.tokenizer = pretrained, tokenizer

    names = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": manager},
    }
    for name, members in names.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tasks_are_run_on_the_loaded_model(harness: list[dict], folders: Path) -> None:
    model = variant(folders, 8)
    found = run_tasks([model], "arc_easy, piqa", "cpu", Console(False))
    assert found == {model: {t: {"acc,none": 0.5, "acc_stderr,none": 0.1} for t in ("arc_easy", "piqa")}}
    assert harness[0]["tasks"] == ["arc_easy", "piqa"]
    ids = harness[0]["model"].tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert torch.isfinite(harness[0]["model"].pretrained(ids).logits).all()
    assert f"{model}  piqa  acc  0.5000" in task_lines(found)


def test_unknown_tasks_are_refused_before_a_model_is_loaded(harness: list[dict]) -> None:
    with pytest.raises(BadRequest, match="no task nonsense"):
        run_tasks(["not-there"], "arc_easy,nonsense", "cpu", Console(False))
    assert not harness


def test_a_task_can_be_a_file(harness: list[dict], folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(BadRequest, match="cannot be read"):
        run_tasks(["not-there"], str(file), "cpu", Console(False))
    file.write_text("group: all\n")
    with pytest.raises(BadRequest, match="names no task"):
        run_tasks(["not-there"], str(file), "cpu", Console(False))
    file.write_text("task: mine\noutput_type: multiple_choice\n")
    run_tasks([variant(folders, 8)], f"{file},piqa", "cpu", Console(False))
    assert harness[0]["tasks"] == ["mine", "piqa"]
