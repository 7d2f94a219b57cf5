"""A decoder whose layers are shared by several GPUs: what its ranks have to agree on. Knows no kernel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantmill.runtime.gpu.layers import Model
from quantmill.runtime.gpu.weights import Weights

if TYPE_CHECKING:
    from quantmill.runtime.parallel.team import Team


def with_common_shrinks(weights: Weights, team: Team | None) -> Weights:
    """The same weights with shrinks that hold for the sum over all ranks, alike on all, as it is of results.

    Each rank has bounded its own part; the bound of a sum is at most the sum of the bounds.
    """
    if team is None or weights.embedding.dtype == torch.bfloat16:  # whose range needs none
        return weights
    sums = team.total([b.shrink for b in weights.blocks])
    powers = [2.0 ** math.ceil(math.log2(s)) for s in sums]
    blocks = (replace(b, shrink=p) for b, p in zip(weights.blocks, powers, strict=True))
    return replace(weights, blocks=tuple(blocks))


def joined(model: Model, team: Team | None) -> Model:
    """The model whose o and down are summed over the team from now on."""
    return model if team is None else replace(model, team=team)
