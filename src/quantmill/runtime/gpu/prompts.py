"""Attention of a prompt by torch's own kernels, behind one kernel that turns queries and keys and fills the cache.

They know no pages, no windows and no cache of eight bits: those, short pieces and pieces that go on with a text
go to ops.attend_tiles. Torch prepares for every length that it sees, so prompts are filled up to a few lengths.
Results are the same to rounding (twins.attend_tiles).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantmill.runtime.gpu.launching import power_of_two
from quantmill.runtime.gpu.tensors import Heads, LayerCache, Rows
from quantmill.runtime.interface import PAGE

LEAST_ROWS = 512  # below, a launch more costs more than it saves
FILLED_TO = 256  # prompts are filled up to a multiple
WIDEST = 128  # elements of a head for which torch's kernel was measured
FROM = (9, 0)  # compute capability, likewise
TURNED_ROWS = 16  # of a program


def can_attend(heads: Heads, cache: LayerCache, count: int, start: int) -> bool:
    """Whether `attend_prompt` serves a piece of so many rows from position `start` on."""
    windowed = 0 < heads.window < count
    plain = cache.key_scales is None and heads.size % 8 == 0 and heads.size <= WIDEST
    device = cache.keys.device
    fast = device.type != "cuda" or torch.cuda.get_device_capability(device) >= FROM
    return fast and plain and start == 0 and count >= LEAST_ROWS and not windowed


def attend_prompt(qkv: Tensor, heads: Heads, cache: LayerCache, rows: Rows) -> Tensor:
    """What ops.write_cache and ops.attend_tiles do, for one piece that begins a text -> (rows, H * D)."""
    count, groups = qkv.shape[0], [heads.count, heads.kv, heads.kv]
    turned = qkv.new_empty(-(-count // FILLED_TO) * FILLED_TO, sum(groups), heads.size)
    turned[count:].zero_()  # filler must be finite
    turn(qkv, heads, cache, rows, turned)
    q, k, v = (t.transpose(0, 1)[None] for t in torch.split(turned, groups, 1))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads.group > 1)
    return mixed[0].transpose(0, 1)[:count].reshape(count, -1)


def turn(qkv: Tensor, heads: Heads, cache: LayerCache, rows: Rows, turned: Tensor) -> None:
    """Queries and keys turned to their positions, and values, into turned (rows or more, H + 2 KVH, D).

    Keys and values go into their pages, too.
    """
    from quantmill.runtime.gpu.kernels.rotary import turn_kernel

    number = qkv.shape[0]
    turn_kernel[(-(-number // TURNED_ROWS), heads.count + heads.kv)](
        qkv,
        qkv if heads.query_norm is None else heads.query_norm,
        qkv if heads.key_norm is None else heads.key_norm,
        heads.cosines,
        heads.sines,
        cache.keys,
        cache.values,
        rows.positions,
        rows.pages,
        turned,
        number,
        H=heads.count,
        KVH=heads.kv,
        D=heads.size,
        BLOCK_D=power_of_two(heads.size),
        PAGE=PAGE,
        EPSILON=heads.epsilon,
        HAS_NORM=heads.query_norm is not None,
        BLOCK=TURNED_ROWS,
        num_warps=4,
    )
