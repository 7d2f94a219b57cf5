"""Two tasks for lm-eval over a file of three lines: nothing is fetched. A plain module beside the tests."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

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
CHOICE = 'doc_to_choice: "{{[answer, other]}}"'
UNTIL = 'generation_kwargs:\n  until: ["zzz"]\n  max_gen_toks: 8'
ROWS = [
    {"question": "the cat sat on", "answer": "a mat", "other": "river"},
    {"question": "birds fly in", "answer": "air", "other": "stone"},
    {"question": "fish swim in", "answer": "water", "other": "sand"},
]


def write_tasks(folder: Path) -> tuple[Path, Path]:
    """toy_choice, scored by log probabilities, and toy_text, by what is generated."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    choice, text = folder / "toy_choice.yaml", folder / "toy_text.yaml"
    choice.write_text(
        TASK.format(name="toy_choice", data=data, kind="multiple_choice", more=CHOICE, metric="acc")
    )
    text.write_text(
        TASK.format(name="toy_text", data=data, kind="generate_until", more=UNTIL, metric="exact_match")
    )
    return choice, text


def with_lm_eval(home: Path) -> dict[str, str]:
    """The environment of a process that has lm-eval, which `make install` puts aside; skips without it."""
    folder = Path(sys.prefix) / "tasks"
    if not (folder / "lm_eval").is_dir():
        pytest.skip("lm-eval is not there: run 'make install'")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    home_there = {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets")}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **quiet, **home_there}
