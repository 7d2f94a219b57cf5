"""The command line as a user meets it: documents, exit codes, one-line mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantmill import cli


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `quantmill WORDS`."""
    sys.argv = ["quantmill", *map(str, words)]
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text("the cat sat on a mat and saw 12 dogs run past the old house by the river. " * 60)
    return path


@pytest.fixture(scope="module")
def made(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches of the tiny model, quantised by the command itself."""
    out = tmp_path_factory.mktemp("made")
    words = ["--variant", "4bit-32g", "--variant", "8bit-32g", "--dataset", str(text)]
    command = [sys.executable, "-m", "quantmill.cli", "quantize", str(tiny_llama), "--out", str(out), *words]
    done = subprocess.run(
        [*command, "--samples", "8", "--seqlen", "64", "--json"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    assert [v["branch"] for v in document["variants"]] == [
        "gptq-4bit-32g-actorder_True",
        "gptq-8bit-32g-actorder_True",
    ]
    for v in document["variants"]:
        assert set(v) == {"branch", "folder", "size_bytes", "modules", "fallbacks"}
        assert (Path(v["folder"]) / "model.safetensors").stat().st_size == v["size_bytes"]
        assert v["modules"] == 14
    assert document["seconds"] > 0
    assert document["peak_ram_bytes"] > 10**8
    assert "solving 28/28" in done.stderr
    return out


def test_plan_reads_nothing_but_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quantize.test_plan import MISTRAL_7B

    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    status, out, _ = call(capsys, "plan", tmp_path, "--json")
    rows = json.loads(out)["variants"]
    assert status == 0
    assert [r["size_bytes"] / 1e9 for r in rows] == pytest.approx([4.16, 4.57, 7.68, 8.17], rel=0.003)
    wanted = {
        "branch",
        "bits",
        "group_size",
        "size_bytes",
        "bits_per_weight",
        "peak_vram_bytes",
        "peak_ram_bytes",
        "seconds",
    }
    assert all(wanted <= set(r) for r in rows)
    status, out, _ = call(capsys, "plan", tmp_path, "--variant", "3bit-64g-noact")
    assert "gptq-3bit-64g-actorder_False" in out


def test_plan_keeps_limits_and_knows_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quantize.test_plan import MISTRAL_7B

    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))

    def vram(*words: str) -> float:
        status, out, _ = call(capsys, "plan", tmp_path, "--variant", "4bit-128g", "--json", *words)
        assert status == 0
        return float(json.loads(out)["variants"][0]["peak_vram_bytes"])

    assert vram("--max-vram", "16GB") < 16e9 < vram() < vram("--preset", "best")
    assert vram("--preset", "best", "--max-vram", "16GB") < 16e9
    status, _, err = call(capsys, "plan", tmp_path, "--max-vram", "2GB")
    assert status == 2
    assert "--max-vram" in err


def test_check_eval_card_generate(
    made: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = made / "gptq-8bit-32g-actorder_True"
    status, out, _ = call(capsys, "check", branch, "--json")
    assert (status, json.loads(out)["ok"]) == (0, True)
    assert json.loads(out)["loaders"]

    words = ["--against", tiny_llama, "--text", text, "--ctx", "64", "--windows", "4"]
    status, out, err = call(capsys, "eval", branch, *words, "--json")
    report = json.loads(out)
    assert status == 0
    assert 0 <= report["mean_kl"] < 0.01
    assert report["top1_agreement"] > 0.9
    assert report["tokens"] == 4 * 63
    assert report["mean_kl_ci"][0] <= report["mean_kl"] <= report["mean_kl_ci"][1]
    assert "flatters" in err
    assert (branch / "eval_report.json").exists()
    status, out, _ = call(capsys, "eval", branch, "--text", text, "--ctx", "64", "--windows", "2")
    assert "perplexity" in out
    assert "mean KL" not in out

    status, out, _ = call(capsys, "card", made, "--name", "me/tiny-GPTQ")
    card = (made / "README.md").read_text()
    assert status == 0
    assert "gptq-4bit-32g-actorder_True" in card
    assert "me/tiny-GPTQ" in card

    words = ["--prompt", "the cat", "--max-new-tokens", "5", "--temperature", "0"]
    status, out, _ = call(capsys, "generate", branch, *words, "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["completion_tokens"] <= 5
    assert answer["tok_s"] > 0
    status, out, err = call(capsys, "generate", branch, *words, "--prompt-lookup", "--json")
    assert status == 0
    assert json.loads(out)["text"] == answer["text"]
    assert "guesses held" in err
    status, _, err = call(
        capsys, "generate", branch, *words, "--cpu-exact", "--context", "40", "--threads", "1"
    )
    assert status == 0
    assert "cpu exact" in err
    status, _, err = call(capsys, "generate", branch, *words, "--context", "2")
    assert status == 2
    assert "the model's context is 2" in err


def test_resume_keeps_what_is_there(
    made: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "quantize",
        tiny_llama,
        "--out",
        made,
        "--variant",
        "4bit-32g",
        "--dataset",
        text,
        "--samples",
        8,
        "--seqlen",
        64,
    ]
    status, _, err = call(capsys, *words)
    assert (status, "--resume" in err) == (2, True)
    before = (made / "gptq-4bit-32g-actorder_True" / "model.safetensors").stat().st_mtime_ns
    status, _, _ = call(capsys, *words, "--resume")
    assert status == 0
    assert (made / "gptq-4bit-32g-actorder_True" / "model.safetensors").stat().st_mtime_ns == before


MISTAKES = [
    (("quantize", "SRC", "--bits", "5"), "bits is 5"),
    (("quantize", "SRC", "--group-size", "12"), "group size 12"),
    (("quantize", "SRC", "--damp", "3"), "damp is 3"),
    (("quantize", "SRC", "--grid", "all"), "--grid card"),
    (("quantize", "SRC", "--grid", "card", "--bits", "4"), "not by two of them"),
    (("quantize", "SRC", "--variant", "4bit-32g", "--variant", "4bit-32g"), "same branch"),
    (("quantize", "SRC", "--variant", "four"), "4bit-128g"),
    (("quantize", "SRC", "--preset", "slow"), "--preset fast"),
    (("quantize", "SRC", "--format", "exl9"), "gptq, gptq_v2"),
    (("quantize", "SRC", "--dataset", "nothing"), "no data set is called"),
    (("quantize", "SRC", "--dataset", "EMPTY"), "empty.txt"),
    (("quantize", "SRC", "--dataset", "missing.txt"), "missing.txt"),
    (("quantize", "NOWHERE",), "does not exist"),
    (("check", "NOWHERE"), "does not exist"),
    (("plan", "SRC", "--variant", "9bit-8g"), "bits is 9"),
    (("generate", "SRC", "--prompt", "x", "--device", "cuda"), "--device cpu"),
    (("generate", "SRC", "--prompt", "x", "--device", "tpu"), "--device cpu"),
    (("generate", "SRC", "--prompt", "x", "--top-p", "7"), "top_p"),
    (("eval", "SRC", "--text", "EMPTY"), "empty.txt"),
    (("eval", "SRC", "--ctx", "100000"), "--ctx 256"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_2(
    words: tuple[str, ...], said: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "empty.txt").write_text("")
    known = {
        "SRC": str(tiny_llama),
        "EMPTY": str(tmp_path / "empty.txt"),
        "NOWHERE": str(tmp_path / "nowhere"),
    }
    typed = [known.get(w, w) for w in words]
    if typed[0] == "quantize":
        typed += ["--out", str(tmp_path / "out"), "--samples", "2", "--seqlen", "32"]
    status, out, err = call(capsys, *typed)
    mine = [line for line in err.splitlines() if line.startswith("quantmill: ")]
    assert status == 2, err
    assert out == ""
    assert len(mine) == 1
    assert said in mine[0]


def test_a_quantised_source_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, "quantize", made / "gptq-8bit-32g-actorder_True", "--out", tmp_path / "out")
    assert (status, "quantised already" in err) == (2, True)


def test_a_failing_check_has_a_status(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    broken = shutil.copytree(made / "gptq-4bit-32g-actorder_True", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    status, out, _ = call(capsys, "check", broken)
    assert status == 2
    assert "error" in out
    assert "up_proj" in out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "quantize", "check", "eval", "card", "generate", "chat", "demo"):
        status, out, _ = call(capsys, command, "--help")
        assert status == 0
        assert "Usage" in out
