"""Which heads and channels of a model each of several ranks holds. Pure arithmetic: no tensors, no processes.

Queries go with their keys: a rank holds whole groups of heads that share a key, as many more than another as there
is a remainder (3 groups on 2 ranks: 2 and 1). Where there are more ranks than keys, several ranks hold the same key
with some of its queries each. Channels between gate, up and down are cut where groups of down's inputs end, if that
leaves the ranks about equal, else at multiples of 32 or 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from quantmill.architectures import Dimensions
from quantmill.errors import BadRequest

STEPS = (32, 16)  # channels that are never cut apart: the kernels' slices and blocks
UNEVEN = 1.15  # of the mean, that the largest share of channels may be so that no group is cut apart


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of every layer: consecutive heads, keys and channels, as [first, last)."""

    rank: int
    size: int
    heads: tuple[int, int]
    keys: tuple[int, int]
    channels: tuple[int, int]

    @property
    def first(self) -> bool:
        return self.rank == 0


def shares_of(sizes: Dimensions, group: int, ranks: int) -> tuple[Share, ...]:
    """The shares of all ranks. group: columns of down_proj that share a scale; -1: all.

    Raises BadRequest, naming a number that works, for more ranks than there are heads or channels.
    """
    most = most_ranks(sizes)
    if not 1 <= ranks <= most:
        raise BadRequest(
            f"the model has {sizes.heads} heads for {sizes.kv_heads} keys and {sizes.intermediate} channels, so "
            f"that {ranks} ranks cannot share it: use --tensor-parallel {most} or less"
        )
    heads, keys = _heads(sizes, ranks)
    channels = _channels(sizes.intermediate, group, ranks)
    return tuple(Share(r, ranks, heads[r], keys[r], channels[r]) for r in range(ranks))


def most_ranks(sizes: Dimensions) -> int:
    """The largest number of ranks of which each gets a head and some channels."""
    return min(sizes.heads, sizes.intermediate // STEPS[-1])


def even(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in consecutive parts, the first ones larger by one where there is a remainder."""
    size, more = divmod(count, parts)
    ends = [size * i + min(i, more) for i in range(parts + 1)]
    return list(pairwise(ends))


def _heads(sizes: Dimensions, ranks: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Of every rank, its heads and its keys."""
    queries = sizes.heads // sizes.kv_heads  # of one key
    if ranks <= sizes.kv_heads:
        keys = even(sizes.kv_heads, ranks)
        return [(first * queries, last * queries) for first, last in keys], keys
    heads, keys = [], []
    for key, (first, last) in enumerate(even(ranks, sizes.kv_heads)):  # the ranks that hold this key
        own = even(queries, last - first)
        heads += [(key * queries + a, key * queries + b) for a, b in own]
        keys += [(key, key + 1)] * len(own)
    return heads, keys


def _channels(count: int, group: int, ranks: int) -> list[tuple[int, int]]:
    """Of every rank, its channels: whole groups, or else whole steps."""
    if 0 < group < count and group % STEPS[-1] == 0:
        units = -(-count // group)
        if units >= ranks and -(-units // ranks) * group * ranks <= UNEVEN * count:
            return [(a * group, min(b * group, count)) for a, b in even(units, ranks)]
    step = next(s for s in STEPS if count % s == 0 and count // s >= ranks)
    return [(a * step, b * step) for a, b in even(count // step, ranks)]
