"""lm-eval, unchanged, against the server and through `quantmill eval`: scored by log probabilities and by text."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from local_tasks import ROWS, with_lm_eval, write_tasks
from quantmill.runtime.llm import LLM, Job
from quantmill.types import SamplingParams
from serve.conftest import Running


@pytest.mark.slow
def test_local_tasks_against_the_server(toy: Running, tiny_llama: Path, tmp_path: Path) -> None:
    environment = with_lm_eval(tmp_path / "home")
    write_tasks(tmp_path)
    model = (
        f"model=toy,base_url={toy.url}/v1/completions,tokenizer={tiny_llama},num_concurrent=2,max_length=512"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "toy_choice,toy_text", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = tmp_path.rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    llm = toy.llms["toy"]
    (kept,) = tmp_path.rglob("samples_toy_choice_*.jsonl")
    for line in kept.read_text().splitlines():
        sample = json.loads(line)
        told = [float(response[0]) for response in sample["filtered_resps"]]
        assert told == pytest.approx([_logprob(llm, sample["doc"], w) for w in ("answer", "other")], abs=1e-3)
    assert results["toy_choice"]["acc,none"] == pytest.approx(
        sum(_logprob(llm, r, "answer") > _logprob(llm, r, "other") for r in ROWS) / len(ROWS)
    )
    (kept,) = tmp_path.rglob("samples_toy_text_*.jsonl")
    greedy = SamplingParams(0.0, repetition_penalty=1.0, max_new_tokens=8)
    for line in kept.read_text().splitlines():
        sample = json.loads(line)
        told = llm.generate(sample["doc"]["question"], greedy)[0].text
        assert sample["resps"][0][0].strip() == told.strip()


def _logprob(llm: LLM, row: dict[str, str], which: str) -> float:
    """Of a continuation, by the engine itself."""
    question = llm.tokenizer.encode(row["question"], special=False)
    whole = llm.tokenizer.encode(f"{row['question']} {row[which]}", special=False)
    job = Job(whole, SamplingParams(max_new_tokens=1), score_prompt=0)
    scores = asyncio.run(llm.agenerate(job)).prompt_scores  # from the second token on
    return sum(s.logprob or 0.0 for s in scores[len(question) - 1 :])


@pytest.mark.slow
def test_local_tasks_through_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    environment = with_lm_eval(tmp_path / "home")
    choice, text = write_tasks(tmp_path)
    command = [sys.executable, "-m", "quantmill.cli", "eval", str(tiny_llama), "--device", "cpu", "--json"]
    command += ["--tasks", f"{choice},{text}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(done.stdout)["tasks"].values()
    assert found["toy_choice"]["acc,none"] in [0, 1 / 3, 2 / 3, 1]
    assert found["toy_text"]["exact_match,none"] == 0
