"""The self-test of an opened model: a few tokens through all layers, every module compared on the way."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantmill.runtime.gpu import ops
from quantmill.runtime.gpu.batches import step_sizes
from quantmill.runtime.gpu.fused import can_fuse, fused_logits, fused_states, with_gains
from quantmill.runtime.gpu.layers import FEW_ROWS, Model, RowsAttention, Way, final_states, logits_of, whole
from quantmill.runtime.gpu.projection import Projection
from quantmill.runtime.gpu.selftest import Probe, compare
from quantmill.runtime.gpu.tensors import Rows
from quantmill.runtime.gpu.weights import Block

GATE_UP = 2  # of a block's projections
log = logging.getLogger(__name__)

FUSED_TOLERANCE = 0.02  # of the logits' norm
TOKENS = 16  # as many rows as the smallest tile of a product takes
REPEATS = 4  # of them, so that the kernel for many rows is tried, too


def check_model(model: Model) -> list[float]:
    """Typical sizes of the residual at every norm. Takes the model's probes away.

    Raises QuantmillError naming a module, of those that have a probe, whose kernels are off.
    """
    weights = model.weights
    probes = dict(weights.probes)
    weights.probes.clear()
    compared = {
        id(projection): _compared(block, i, probes)
        for block in weights.blocks
        for i, projection in enumerate(block.projections)
    }
    rows = _few_tokens(model)

    def product(projection: Projection, x: Tensor) -> Tensor:
        few = projection.few(x)
        found = compared.get(id(projection))
        if found is not None and found[0]:
            own = x if projection.order is None else x.index_select(1, _inverse(projection))
            compare(*found, own, few, "few rows")
            compare(*found, own, projection.through_copy(x), "a dense copy")
            compare(*found, own, projection.many(x.repeat(REPEATS, 1))[: len(x)], "many rows")
        return few

    attention = RowsAttention(
        rows, ops.make_scratch(TOKENS, model.heads[0], weights.embedding.device), alone=False
    )
    way = Way(product, lambda projection, x: whole(product(projection, x)))
    seen: list[Tensor] = []
    final_states(
        model, rows.tokens, way, attention, lambda x: seen.append(x.square().mean(1).sqrt().median())
    )
    return [float(size) for size in torch.stack(seen)]


def prepared(model: Model, fused: bool) -> Model:
    """The model once its linears have been checked; with what fused steps need, if they are asked for and right."""
    sizes = check_model(model)
    if not fused or not can_fuse(model):
        return model
    ready = with_gains(model, sizes)
    error, alike = _fused_error(ready)
    if error < FUSED_TOLERANCE:
        return replace(ready, alike=alike)
    log.warning(
        "fused steps are off by %.2g on this GPU, so kernels run between the linears: report it", error
    )
    return model


def _fused_error(model: Model) -> tuple[float, int]:
    """Relative difference of the logits of a few tokens, with kernels between the linears and without.

    Infinite where they do not compile, or where a row's bits depend on how many rows there are. And how many rows
    a step may have for that.
    """
    from triton.errors import TritonError

    rows = _few_tokens(model)
    attention = _attention(model, rows)
    wanted = logits_of(model, final_states(model, rows.tokens, FEW_ROWS, attention))
    try:
        found = fused_logits(model, *fused_states(model, rows.tokens, attention))
        alike = next((most for most in step_sizes() if _same_bits(model, rows, found, most)), 0)
    except TritonError as error:
        log.warning("fused steps do not compile here: %s", error)
        return float("inf"), 0
    off = float((found - wanted).norm() / wanted.norm())
    return off if off == off and alike else float("inf"), alike


def _same_bits(model: Model, rows: Rows, found: Tensor, most: int) -> bool:
    """Whether the rows, repeated until there are so many, get the logits that they get alone."""
    more = _repeated(rows, most // TOKENS)
    all_found = fused_logits(model, *fused_states(model, more.tokens, _attention(model, more)))
    same = bool((all_found.view(-1, *found.shape) == found).all())
    if not same:
        log.info("%d rows have other bits than %d on this GPU: a step takes fewer", most, len(found))
    return same


def _attention(model: Model, rows: Rows) -> RowsAttention:
    count = rows.tokens.shape[0]
    scratch = ops.make_scratch(count, model.heads[0], rows.tokens.device)
    return RowsAttention(rows, scratch, alone=False)


def _repeated(rows: Rows, times: int) -> Rows:
    """The same rows several times."""
    tokens, positions, lines = (t.repeat(times) for t in (rows.tokens, rows.positions, rows.sequences))
    return Rows(tokens, positions, lines, rows.pages)


def _few_tokens(model: Model) -> Rows:
    """TOKENS ids from all over the vocabulary as one text, in the cache's first page."""
    device = model.weights.embedding.device
    tokens = np.linspace(0, model.weights.embedding.shape[0] - 1, TOKENS).astype(np.int32)
    positions = torch.arange(TOKENS, dtype=torch.int32, device=device)
    first_page = torch.zeros(1, 1, dtype=torch.int32, device=device)
    return Rows(torch.from_numpy(tokens).to(device), positions, torch.zeros_like(positions), first_page)


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
