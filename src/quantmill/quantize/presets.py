"""What a preset does to a linear: one table of recipes. Knows no tensors.

`fast` is GPTQ with this project's grids; `best` adds what benchmarks/quality.py showed to pay at model level.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantmill.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Recipe:
    """One preset. Every field is a step that can be left out, which is how the ablation is made."""

    name: str
    two_streams: bool = True  # the original's activations beside the quantised model's
    heldout: float = 0.1  # share of the calibration lanes that steps are judged on
    damps: tuple[float, ...] = ()  # tried on held-out loss; empty: the variant's own
    orders: tuple[str, ...] = ("static",)  # tried on held-out loss: static, group-aware
    shifts: tuple[float, ...] = (0.0,)  # strengths of the target shift tried on held-out loss
    residual: bool = False  # linears that write to the residual stream make up for its error, too
    rounds: int = 0  # of (descent, refit), each kept only where held-out loss falls
    pooled: bool = False  # solve again on fit and held-out rows together once the choices are made


FAST = Recipe("fast", two_streams=False, heldout=0.0)
BEST = Recipe(
    "best",
    damps=(0.01, 0.03, 0.1),
    orders=("static", "group-aware"),
    shifts=(0.0, 0.25, 0.5, 0.75, 1.0),
    residual=True,
    rounds=3,
)
PRESETS = {recipe.name: recipe for recipe in (FAST, BEST)}


def recipe_of(preset: str) -> Recipe:
    """The recipe of a preset. Raises BadRequest for an unknown one."""
    if preset not in PRESETS:
        raise BadRequest(f"there is no preset {preset!r}: use --preset {' or '.join(PRESETS)}")
    return PRESETS[preset]
