"""The self-test of an opened model: a few tokens through all layers, every module compared on the way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantmill.runtime.gpu.fused import can_fuse, with_gains
from quantmill.runtime.gpu.layers import Model, RowsAttention, Way, final_states
from quantmill.runtime.gpu.ops import Rows, Scratch
from quantmill.runtime.gpu.projection import Projection
from quantmill.runtime.gpu.selftest import Probe, compare
from quantmill.runtime.gpu.weights import Block

GATE_UP = 2  # of a block's projections
TOKENS = 16  # as many rows as the smallest tile of a product takes


def check_model(model: Model) -> list[float]:
    """Typical sizes of the residual at every norm. Takes the model's probes away.

    Raises QuantmillError naming a module, of those that have a probe, whose kernels are off.
    """
    weights, device = model.weights, model.weights.embedding.device
    probes = dict(weights.probes)
    weights.probes.clear()
    compared = {
        id(projection): _compared(block, i, probes)
        for block in weights.blocks
        for i, projection in enumerate(block.projections)
    }
    vocab = weights.embedding.shape[0]
    tokens = torch.from_numpy(np.linspace(0, vocab - 1, TOKENS).astype(np.int32)).to(device)
    positions = torch.arange(TOKENS, dtype=torch.int32, device=device)
    first_page = torch.zeros(1, 1, dtype=torch.int32, device=device)
    rows = Rows(tokens, positions, torch.zeros_like(positions), first_page)

    def product(projection: Projection, x: Tensor) -> Tensor:
        few = projection.few(x)
        found = compared.get(id(projection))
        if found is not None and found[0]:
            own = x if projection.order is None else x.index_select(1, _inverse(projection))
            compare(*found, own, few, "few rows")
            compare(*found, own, projection.many(x), "many rows")
        return few

    attention = RowsAttention(rows, Scratch.of(TOKENS, model.heads[0], device), alone=False)
    way = Way(product, lambda projection, x: [(slice(None), product(projection, x))])
    seen: list[Tensor] = []
    final_states(model, tokens, way, attention, lambda x: seen.append(x.square().mean(1).sqrt().median()))
    return [float(size) for size in torch.stack(seen)]


def prepared(model: Model) -> Model:
    """The model once it has been checked, with what its steps need where they can be fused."""
    sizes = check_model(model)
    return with_gains(model, sizes) if can_fuse(model) else model


def _compared(block: Block, which: int, probes: dict[str, Probe]) -> tuple[list[Probe], list[Tensor]]:
    """The probes of a projection's modules, and where their outputs are in its result."""
    ones, places, offset = [], [], 0
    projection = block.projections[which]
    for number, (module, outputs) in enumerate(block.modules[which]):
        if module in probes:
            columns = probes[module].columns
            if which == GATE_UP:
                columns = columns if block.reorder is None else torch.argsort(block.reorder)[columns]
                span = projection.span
                at = columns // span * (2 * span) + number * span + columns % span
            else:
                at = offset + columns
            ones.append(probes[module])
            places.append(at)
        offset += outputs
    return ones, places


def _inverse(projection: Projection) -> Tensor:
    places = projection.place_of
    assert places is not None, "a projection with an order has an inverse"
    return places.long()
