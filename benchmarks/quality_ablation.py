"""Preset best with one step left out or changed, and models cut to their first blocks: used by quality.py.

What a row of `Recipe` cannot say is done by putting another function in a step's place for as long as one variant
is made.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# maker -> what is changed in the recipe `best`
RECIPES: dict[str, dict[str, Any]] = {
    "best-shift": {"shifts": (0.0,)},
    "best-residual": {"residual": False},
    "best-streams": {"shifts": (0.0,), "residual": False},
    "best-ridges": {"shift_ridges": (0.1,)},
    "best-gate": {"heldout": 0.0},
    "best+pooled": {"pooled": True},
    "best-descent": {"rounds": 0},
    "best-damp": {"damps": (0.05,)},
}


def recipes() -> dict[str, Any]:
    """Every maker of this file as a recipe, by name; those of `PATCHES` are `best` itself."""
    from quantmill.quantize.presets import BEST

    changed = RECIPES | {maker: {} for maker in PATCHES}
    return {name: dataclasses.replace(BEST, **change) for name, change in changed.items()}


def _flat_grids(solver: Any, _: Any) -> tuple[Any, str, Any]:
    """Grids fitted without weights: every column's error counts the same."""
    fit = solver.fit_grids
    return solver, "fit_grids", lambda W, cost, config: fit(W, cost.new_ones(len(cost)), config)


def _no_feedback(_: Any, refine: Any) -> tuple[Any, str, Any]:
    """Columns rounded to nearest, as if no later column could make up for an error; grids weighted as ever."""
    factorise = refine.factorise

    def lonely(*given: Any) -> Any:
        factor, fallback = factorise(*given)
        eye = factor.feedback.new_zeros(factor.feedback.shape).fill_diagonal_(1)
        return dataclasses.replace(factor, feedback=eye), fallback

    return refine, "factorise", lonely


def _no_refit(_: Any, refine: Any) -> tuple[Any, str, Any]:
    """Scales as the grid search found them."""
    return refine, "refit", lambda target, damped, linear: linear


def _as_they_come(_: Any, refine: Any) -> tuple[Any, str, Any]:
    """Columns rounded from the first to the last instead of the most active first."""
    import torch

    factorise = refine.factorise

    def in_turn(H: Any, config: Any, order: Any = None) -> Any:
        return factorise(H, config, torch.arange(len(H), device=H.device))

    return refine, "factorise", in_turn


# maker -> (solver, refine) -> module, name, what stands there instead
PATCHES: dict[str, Callable[[Any, Any], tuple[Any, str, Any]]] = {
    "best-weights": _flat_grids,
    "best-feedback": _no_feedback,
    "best-refit": _no_refit,
    "best-order": _as_they_come,
}


@contextmanager
def without(maker: str) -> Iterator[None]:
    """Leave out what `maker` names, if it is one of `PATCHES`."""
    from quantmill.quantize import refine, solver

    if maker not in PATCHES:
        yield
        return
    module, name, instead = PATCHES[maker](solver, refine)
    kept = getattr(module, name)
    setattr(module, name, instead)
    try:
        yield
    finally:
        setattr(module, name, kept)


def first_blocks(source: Path, count: int, out: Path) -> Path:
    """A Transformers folder with the first `count` blocks of a model; everything else as it is."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    model.save_pretrained(out)
    for file in source.glob("*token*"):
        shutil.copy(file, out)
    return out
