"""Who holds which heads and channels: everything once, keys with their queries, groups whole where that is fair."""

from __future__ import annotations

import pytest

from quantmill.architectures import Dimensions
from quantmill.errors import BadRequest
from quantmill.runtime.parallel.shares import most_ranks, shares_of


def sizes(heads: int, keys: int, channels: int = 1536) -> Dimensions:
    return Dimensions(576, channels, 2, heads, keys, 64, 1000, tied=True)


def test_uneven_groups_of_heads_stay_whole() -> None:
    first, second = shares_of(sizes(9, 3), 64, 2)  # SmolLM2
    assert (first.heads, first.keys) == ((0, 6), (0, 2))
    assert (second.heads, second.keys) == ((6, 9), (2, 3))
    assert (first.channels, second.channels) == ((0, 768), (768, 1536))
    assert first.first
    assert not second.first


def test_more_ranks_than_keys_hold_copies_of_them() -> None:
    found = shares_of(sizes(9, 3), 64, 5)
    assert [s.keys for s in found] == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3)]
    assert [s.heads for s in found] == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 9)]


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("group", [-1, 24, 32, 128, 2048])
def test_everything_is_held_once(ranks: int, group: int) -> None:
    model = sizes(8, 2, 14336)
    found = shares_of(model, group, ranks)
    for name, count in (("heads", 8), ("channels", 14336)):
        ends = [getattr(s, name) for s in found]
        assert ends[0][0] == 0
        assert ends[-1][1] == count
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(ends, [*ends[1:], (count, 0)], strict=True))
    assert all((s.channels[1] - s.channels[0]) % 16 == 0 for s in found)
    for s in found:
        assert {h // 4 for h in range(*s.heads)} == set(range(*s.keys))
        assert (s.heads[1] - s.heads[0]) % (s.keys[1] - s.keys[0]) == 0
    widest = max(s.channels[1] - s.channels[0] for s in found)
    assert widest * ranks <= 1.15 * 14336


def test_groups_are_cut_only_where_whole_ones_would_be_unfair() -> None:
    assert [s.channels for s in shares_of(sizes(9, 3), 128, 2)] == [(0, 768), (768, 1536)]
    assert [s.channels for s in shares_of(sizes(9, 3, 384), 128, 2)] == [(0, 192), (192, 384)]
    assert [s.channels for s in shares_of(sizes(9, 3, 80), 32, 2)] == [(0, 48), (48, 80)]


def test_too_many_ranks_are_refused_with_a_number_that_works() -> None:
    assert most_ranks(sizes(9, 3)) == 9
    for ranks in (10, 0):
        with pytest.raises(BadRequest, match=r"use --tensor-parallel 9 or less"):
            shares_of(sizes(9, 3), 64, ranks)
    with pytest.raises(BadRequest, match=r"use --tensor-parallel 2 or less"):
        shares_of(sizes(9, 3, 32), 32, 3)
