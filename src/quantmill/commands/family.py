"""`--grid family`: a GPTQ, an AWQ and a GGUF repository of one model, side by side in one folder, with cards.

OUT/gptq/main   OUT/awq/main   OUT/gguf/Q2_K ...      each first folder is a repository to publish
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from quantmill.architectures import linear_shapes
from quantmill.commands.describing import describe
from quantmill.console import Console
from quantmill.hub.card import NO_OWNER, Siblings, model_name
from quantmill.hub.card_facts import read_making
from quantmill.quantize.awq_scales import refusal
from quantmill.types import Json, Variant

AWQ_GROUPS = (128, 64, 32)
REPOSITORIES = ("gptq", "awq", "gguf")


def fitting(variants: Sequence[Variant], config: Json, console: Console) -> tuple[Variant, ...]:
    """The variants, AWQ with the largest group that divides every linear's inputs; without it if none does."""
    kept = []
    for variant in variants:
        if variant.container != "awq":
            kept.append(variant)
        elif (awq := _awq(variant, config)) is None:
            console.note("AWQ is left out: no group of 128, 64 or 32 divides the inputs of every linear")
        else:
            kept.append(awq)
    return tuple(kept)


def _awq(variant: Variant, config: Json) -> Variant | None:
    shapes = linear_shapes(config).values()
    for size in AWQ_GROUPS:
        parameters = dataclasses.replace(variant.config, group_size=size)
        if not any(refusal(parameters, s.in_features, s.out_features) for s in shapes):
            return dataclasses.replace(variant, config=parameters)
    return None


def repositories(folder: Path) -> list[Path]:
    """The repositories of a family, in the order of REPOSITORIES; [] where the folder is none."""
    named = [folder / name for name in REPOSITORIES]
    return [r for r in named if r.is_dir() and any(p.is_dir() for p in r.iterdir())]


def describe_family(folder: Path, name: str | None) -> list[Path]:
    """A card for each repository, each naming the others. `name` is the model's: `owner/Model` or `Model`."""
    found = repositories(folder)
    names = {r.name: f"{_base(found[0], name)}-{r.name.upper()}" for r in found}
    owned = {key: value.removeprefix(f"{NO_OWNER}/") for key, value in names.items()}
    return [describe(r, owned[r.name], Siblings(**names)) for r in found]


def _base(repository: Path, name: str | None) -> str:
    """`owner/Model`, the owner's place held where nobody said who it is."""
    owner, _, model = (name or "").rpartition("/")
    if not model:
        report = next(iter(sorted(repository.glob("*/quantize_report.json"))), None)
        source = read_making(report.parent) if report else None
        named = source.source.name if source and source.source else repository.resolve().parent.name
        model = model_name(named, None, None, None, "GPTQ").model
    return f"{owner or NO_OWNER}/{model}"
