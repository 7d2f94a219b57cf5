"""The slow twins of ops.py in plain torch, on any device, with the same arguments.

Tests and the trial at load compare with them (trial.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.runtime.gpu.tensors import Draws, Gains, Heads, LayerCache, Rows, Scratch
from quantmill.runtime.interface import PAGE


def embed_normed(
    residual: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    gain: Tensor,
    epsilon: float,
    order: Tensor | None,
    out: Tensor,
) -> None:
    """See ops.embed_normed."""
    residual.copy_(embedding[tokens.long()].float())
    add_normed(residual, None, gain, epsilon, order, out)


def add_normed(
    residual: Tensor,
    added: Tensor | None,
    gain: Tensor,
    epsilon: float,
    order: Tensor | None,
    out: Tensor,
    *,
    times: float = 1.0,
) -> None:
    """See ops.add_normed."""
    if added is not None:
        residual += added.float() * times
    normed = residual * torch.rsqrt(residual.square().mean(1, keepdim=True) + epsilon) * gain
    if order is not None:
        normed = normed[:, order.long().clamp(min=0)].masked_fill(order < 0, 0.0)
    out.copy_(normed)


def start(
    residual: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    norm: Gains,
    position: Tensor | None,
    after: Tensor,
    squares: Tensor,
) -> None:
    """See ops.start."""
    residual.copy_(embedding[tokens.long()].float())
    squares.copy_(residual.square().view(len(tokens), -1, 16).sum(2))
    place = torch.arange(residual.shape[1]) if position is None else position.long()
    after[:, place.to(after.device)] = (residual * norm.gain * norm.scale).to(after.dtype)


def gated(gate_up: Tensor, span: int, scale: float, out: Tensor) -> None:
    """See ops.gated."""
    gate, up = gate_up.float().view(len(out), -1, 2, span).permute(2, 0, 1, 3).reshape(2, *out.shape)
    out.copy_(torch.nn.functional.silu(gate) * up * scale)


def write_cache(qkv: Tensor, heads: Heads, cache: LayerCache, rows: Rows) -> None:
    """See ops.write_cache."""
    _, keys, values = _turned(qkv, heads, rows.positions)
    for i, position in enumerate(rows.positions.tolist()):
        if position >= 0:
            page = int(rows.pages[int(rows.sequences[i]), position // PAGE])
            _store(cache.keys, cache.key_scales, page, position % PAGE, keys[i])
            _store(cache.values, cache.value_scales, page, position % PAGE, values[i])


def attend_rows(
    qkv: Tensor,
    heads: Heads,
    cache: LayerCache,
    rows: Rows,
    scratch: Scratch,
    places_of: Tensor | None,
    out: Tensor,
    *,
    writes: bool,
    following: LayerCache | None = None,
) -> None:
    """See ops.attend_rows. `scratch` is not touched."""
    if writes:
        write_cache(qkv, heads, cache, rows)
    queries, _, _ = _turned(qkv, heads, rows.positions)
    for i, position in enumerate(rows.positions.tolist()):
        if position >= 0:
            line = rows.pages[int(rows.sequences[i])]
            _place(out[i], _attended(queries[i], heads, cache, line, position), places_of)


def attend_tiles(
    qkv: Tensor,
    heads: Heads,
    cache: LayerCache,
    tiles: Tensor,
    pages: Tensor,
    places_of: Tensor | None,
    out: Tensor,
    *,
    windowed: bool,
) -> None:
    """See ops.attend_tiles."""
    for first, count, start, line in tiles.tolist():
        positions = torch.arange(start, start + count, device=qkv.device)
        queries, _, _ = _turned(qkv[first : first + count], heads, positions)
        for i in range(count):
            seen = _attended(queries[i], heads, cache, pages[line], start + i)
            _place(out[first + i], seen, places_of)


def dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    squares: Tensor | None = None,
    norm: Gains | None = None,
) -> None:
    """See ops.dense."""
    product = x.float() @ weight.float().T
    if squares is not None and norm is not None:
        product *= torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[1] + norm.epsilon) / norm.scale
    y.copy_(product if bias is None else product + bias.float())


def draw(logits: Tensor, draws: Draws, rows: Rows) -> None:
    """See drawing.draw; by runtime/sampling.py's rules."""
    for i in range(logits.shape[0]):
        if rows.positions[i] < 0:
            continue
        step = int(draws.steps[i]) % draws.drawn.shape[0]
        token = _drawn(logits[i], draws, i, float(draws.uniforms[step, i]))
        rows.tokens[i], draws.drawn[step, i] = token, token
        rows.positions[i] += 1
        draws.steps[i] += 1


def _drawn(line: Tensor, draws: Draws, i: int, uniform: float) -> int:
    if draws.sharpness[i] == 0:
        return int(line.argmax())
    z = (line - line.max()) * draws.sharpness[i]
    if draws.top_ks[i] < len(z):
        z = z.masked_fill(z < z.topk(int(draws.top_ks[i])).values[-1], -torch.inf)
    weights = z.double().exp()
    if draws.top_ps[i] < 1:
        high = weights.sort(descending=True).values
        cut = int(torch.searchsorted(high.cumsum(0), draws.top_ps[i].double() * weights.sum()))
        weights = weights * (weights >= high[min(cut, len(high) - 1)])
    reached = weights.cumsum(0)
    target = (uniform * reached[-1]).clamp(max=torch.nextafter(reached[-1], reached.new_zeros(())))
    return int(torch.searchsorted(reached, target, right=True))


def _turned(qkv: Tensor, heads: Heads, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (rows, H, D) and keys (rows, KVH, D) turned, rounded as the kernels do; values as they are."""
    rows = qkv.float().view(qkv.shape[0], -1, heads.size)
    queries, keys, values = torch.split(rows, [heads.count, heads.kv, heads.kv], 1)
    if heads.query_norm is not None and heads.key_norm is not None:
        queries = _head_normed(queries, heads.query_norm, heads.epsilon)
        keys = _head_normed(keys, heads.key_norm, heads.epsilon)
    at = positions.long().clamp(min=0)
    cosines, sines = (table[at].repeat(1, 2)[:, None] for table in (heads.cosines, heads.sines))

    def turn(x: Tensor) -> Tensor:
        left, right = x.chunk(2, 2)
        return x * cosines + torch.cat([-right, left], 2) * sines

    return turn(queries).to(qkv.dtype).float(), turn(keys), values


def _head_normed(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(2, keepdim=True) + epsilon) * gain


def _store(cache: Tensor, scales: Tensor | None, page: int, place: int, vectors: Tensor) -> None:
    """vectors (KVH, D)."""
    if scales is None:
        cache[page, :, place] = vectors.to(cache.dtype)
        return
    scale = (vectors.abs().amax(1) / 448).clamp(min=1e-6).half()
    small = (vectors / scale.float()[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales[page, :, place] = scale
    cache[page, :, place] = small.view(torch.uint8)


def _attended(queries: Tensor, heads: Heads, cache: LayerCache, line: Tensor, position: int) -> Tensor:
    """One row's result (H, D) float32."""
    at = torch.arange(max(0, position - heads.reach + 1), position + 1, device=queries.device)
    pages, places = line[at // PAGE].long(), at % PAGE

    def gathered(vectors: Tensor, scales: Tensor | None) -> Tensor:
        found = vectors[pages, :, places]
        if scales is None:
            return found.float()
        return found.view(torch.float8_e4m3fn).float() * scales[pages, :, places].float()[..., None]

    keys = gathered(cache.keys, cache.key_scales).repeat_interleave(heads.group, 1)
    values = gathered(cache.values, cache.value_scales).repeat_interleave(heads.group, 1)
    scores = torch.einsum("hd,khd->hk", queries, keys) * heads.size**-0.5
    return torch.einsum("hk,khd->hd", scores.softmax(1), values)


def _place(out: Tensor, result: Tensor, places_of: Tensor | None) -> None:
    flat = result.reshape(-1).to(out.dtype)
    if places_of is None:
        out.copy_(flat)
    else:
        out[places_of.long()] = flat
