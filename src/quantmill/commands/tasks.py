"""`quantmill eval --tasks`: accuracy on tasks, through lm-eval (the extra `tasks`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantmill.commands.machine import pick_device
from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.sources import resolve
from quantmill.types import Json


def run_tasks(models: Sequence[str], tasks: str, device: str, console: Console) -> Json:
    """Metrics by model and task, with lm-eval's standard errors.

    tasks: names and YAML files, comma-separated. Raises BadRequest where lm-eval is not installed or does not know
    a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise BadRequest(
            f"--tasks needs lm-eval, which is not installed ({e}): pip install 'quantmill[tasks]'"
        ) from e
    names, folders = _named(tasks)
    manager: Any = TaskManager(include_path=folders) if folders else TaskManager()
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise BadRequest(f"lm-eval has no task {', '.join(unknown)}: lm-eval ls tasks lists what there is")
    found: Json = {}
    for model in models:
        folder = resolve(model, notify=console.note)
        loaded = load_model(folder, device=pick_device(device))
        runner = HFLM(pretrained=loaded, tokenizer=load_tokenizer(folder))
        results = simple_evaluate(model=runner, tasks=names, task_manager=manager, bootstrap_iters=1000)
        found[model] = {task: _numbers(metrics) for task, metrics in results["results"].items()}
        del loaded, runner
    return found


def _named(tasks: str) -> tuple[list[str], list[str]]:
    """Tasks by name, and the folders of those that are files. Raises BadRequest."""
    names, folders = [], []
    for said in (s.strip() for s in tasks.split(",")):
        if said.endswith((".yaml", ".yml")):
            names.append(_name_in(Path(said).expanduser()))
            folders.append(str(Path(said).expanduser().resolve().parent))
        elif said:
            names.append(said)
    return names, folders


def _name_in(file: Path) -> str:
    """The task of a file: its line `task: NAME`. Nothing of it is run here."""
    try:
        found = re.search(r"^task:[ \t]*([\w.-]+)[ \t]*$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as e:
        raise BadRequest(f"{file} cannot be read ({e}): give a task of lm-eval as a YAML file") from e
    if found is None:
        raise BadRequest(f"{file} names no task: write a line `task: NAME`")
    return found[1]


def _numbers(metrics: Json) -> Json:
    """lm-eval's metrics without its filters' and aliases' names."""
    return {k: v for k, v in metrics.items() if isinstance(v, (int, float))}


def task_lines(found: Json) -> list[str]:
    """Results for people: a line per model, task and metric."""
    return [
        f"{model}  {task}  {metric.removesuffix(',none')}  {value:.4f}"
        for model, tasks in found.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    ]
