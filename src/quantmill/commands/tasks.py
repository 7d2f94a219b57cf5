"""`quantmill eval --tasks`: accuracy on tasks, through lm-eval (the extra `tasks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantmill.commands.machine import pick_device
from quantmill.console import Console
from quantmill.errors import BadRequest
from quantmill.runtime.load import load_model, load_tokenizer
from quantmill.sources import resolve
from quantmill.types import Json


def run_tasks(models: Sequence[str], tasks: str, device: str, console: Console) -> Json:
    """Metrics by model and task, with lm-eval's standard errors.

    Raises BadRequest where lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise BadRequest(
            f"--tasks needs lm-eval, which is not installed ({e}): pip install 'quantmill[tasks]'"
        ) from e
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager: Any = TaskManager()
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
