"""What a preset does to a linear: one table of recipes. Knows no tensors.

`fast` is GPTQ with this project's grids; `best` adds what benchmarks/quality.py showed to pay at model level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantmill.errors import BadRequest
from quantmill.types import QuantConfig, Variant


@dataclass(frozen=True, slots=True)
class Recipe:
    """One preset. Every field is a step that can be left out, which is how the ablation is made."""

    name: str
    two_streams: bool = True  # the original's activations beside the quantised model's
    heldout: float = 0.1  # share of the calibration lanes that steps are judged on
    damps: tuple[float, ...] = ()  # tried on held-out loss; empty: the variant's own
    orders: tuple[str, ...] = ("static",)  # tried on held-out loss: static, group-aware
    shifts: tuple[float, ...] = (0.0,)  # strengths of the target shift tried on held-out loss
    shift_ridges: tuple[float, ...] = (0.1,)  # and its ridges, shares of the Hessian's mean diagonal
    residual: bool = False  # linears that write to the residual stream make up for its error, too
    rounds: int = 0  # of (descent, refit), each kept only where held-out loss falls
    pooled: bool = False  # solve again on fit and held-out rows together once the choices are made


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast."""

    steps: int
    rate: float
    norm_rate: float
    code_rate: float = 0.0  # of the codes, in steps of the grid; 0: they stay as solved
    lean: float = 0.0  # how far codes start towards the original weight, a share of what keeps them as solved
    warmup: float = 0.05


FAST = Recipe("fast", two_streams=False, heldout=0.0)
# Of three dampings and two orders tried per group, held-out loss chose 0.1 and static for 95 % of 210 modules at 3
# and at 4 bits, so only those are left; the other rows of `Recipe` can still be tried (benchmarks/quality.py).
BEST = Recipe(
    "best",
    damps=(0.1,),
    shifts=(0.0, 0.25, 0.5, 0.75, 1.0),
    shift_ridges=(0.03, 0.1, 0.3, 1.0),
    residual=True,
    rounds=3,
)
PRESETS = {recipe.name: recipe for recipe in (FAST, BEST)}


def recipe_of(preset: str, variant: Variant) -> Recipe:
    """The recipe of a preset for a variant: at 8 bits nothing beyond `fast` can be told from noise."""
    return FAST if lowest_bits(variant) == 8 else PRESETS[preset]


def lowest_bits(variant: Variant) -> int:
    """The coarsest of a variant's modules: what training schedules go by."""
    return min(c.bits for c in (variant.config, *(c for _, c in variant.dynamic)))


def module_recipe(recipe: Recipe, config: QuantConfig) -> Recipe:
    """The recipe of a module in a mixed variant: at 8 bits only what costs nothing."""
    return replace(recipe, damps=(), orders=("static",), rounds=0) if config.bits == 8 else recipe


def refuse_unknown(preset: str, trained: bool) -> None:
    """Raise BadRequest for a preset that is not there, or training where the preset keeps no original stream."""
    if preset not in PRESETS:
        raise BadRequest(f"there is no preset {preset!r}: use --preset {' or '.join(PRESETS)}")
    if trained and not PRESETS[preset].two_streams:
        raise BadRequest(f"--tune-blocks and --distill need --preset best; {preset} does not train")


# Steps; learning rates of scales and norms (relative to their size) and of codes (in steps of the grid); by bits.
TUNE = {
    2: Schedule(steps=100, rate=1e-3, norm_rate=1e-3, code_rate=3e-2),
    3: Schedule(steps=100, rate=1e-3, norm_rate=1e-3, code_rate=3e-2),
    4: Schedule(steps=100, rate=5e-4, norm_rate=5e-4),
}
# One after the other, each from the best state of the one before.
DISTILL = {
    2: (
        Schedule(steps=150, rate=3e-3, norm_rate=1e-3),
        Schedule(steps=150, rate=1e-3, norm_rate=5e-4, code_rate=1e-2),
    ),
    3: (
        Schedule(steps=100, rate=2e-3, norm_rate=1e-3),
        Schedule(steps=100, rate=1e-3, norm_rate=5e-4, code_rate=1e-2),
    ),
    4: (Schedule(steps=150, rate=1e-3, norm_rate=1e-3),),
}
# Rows that the original model writes itself to be distilled on, times the calibration rows.
OWN_TEXT = {2: 0, 3: 0, 4: 0}
