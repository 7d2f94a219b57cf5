"""lm-eval, unchanged, against the server: a local task, scored by log probabilities and by what is generated.

It brings half of the world with it, so it is not installed beside us: put it into a folder of its own
(pip install --target FOLDER lm-eval) and name that in LM_EVAL_FOLDER.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.conftest import Running

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
ROWS = [{"question": "the cat sat on", "answer": " a mat", "other": " river"}] * 3


@pytest.mark.slow
def test_a_local_task(toy: Running, tiny_llama: Path, tmp_path: Path) -> None:
    folder = os.environ.get("LM_EVAL_FOLDER", "")
    if importlib.util.find_spec("lm_eval") is None and not Path(folder, "lm_eval").is_dir():
        pytest.skip(
            "lm-eval is not installed: pip install --target FOLDER lm-eval, and LM_EVAL_FOLDER=FOLDER"
        )
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    choice = 'doc_to_choice: ["{{answer}}", "{{other}}"]'
    until = 'generation_kwargs:\n  until: ["zzz"]\n  max_gen_toks: 8'
    (tmp_path / "a.yaml").write_text(
        TASK.format(name="toy_choice", data=data, kind="multiple_choice", more=choice, metric="acc")
    )
    (tmp_path / "b.yaml").write_text(
        TASK.format(name="toy_text", data=data, kind="generate_until", more=until, metric="exact_match")
    )
    model = (
        f"model=toy,base_url={toy.url}/v1/completions,tokenizer={tiny_llama},num_concurrent=2,max_length=512"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += [
        "--tasks",
        "toy_choice,toy_text",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path),
    ]
    home = str(tmp_path / "home")
    environment = {**os.environ, "PYTHONPATH": folder, "HF_HOME": home, "HF_DATASETS_CACHE": f"{home}/d"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = tmp_path.rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results["toy_choice"]["acc,none"] in (0.0, 1.0)
    assert results["toy_text"]["exact_match,none"] == 0.0
