"""The page pool: who holds what, what is found again, what is given up first."""

from __future__ import annotations

import random

import pytest

from quantmill.errors import BadRequest
from quantmill.runtime.interface import PAGE, RuntimeFacts
from quantmill.runtime.pages import GONE, PagePool, page_keys, pages_for


def pool(pages: int = 8, window: int | None = None) -> PagePool:
    return PagePool(RuntimeFacts("test", 10, 1, 4096, window, pages, 64, 4, 1, 1, ()))


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def test_pages_are_taken_and_given_back() -> None:
    p = pool()
    mine = p.take(5)
    assert len(set(mine)) == 5
    assert p.available == 3
    with pytest.raises(BadRequest, match="4 cache pages are needed and 3 are there"):
        p.take(4)
    p.release(mine)
    assert p.counts == type(p.counts)(8, 0, 0, 8)
    with pytest.raises(ValueError, match="nobody who holds it"):
        p.release(mine[:1])


def test_keys_name_whole_prefixes() -> None:
    a = page_keys(tokens(3 * PAGE + 5))
    assert len(a) == 3
    assert a == page_keys(tokens(3 * PAGE), known=a[:1])
    b = page_keys([99, *tokens(3 * PAGE)[1:]])
    assert not set(a) & set(b)
    assert page_keys(tokens(PAGE), salt=b"other") != a[:1]
    assert page_keys(tokens(PAGE - 1)) == []


def test_a_named_prefix_is_found_again_until_room_is_needed() -> None:
    p = pool(4)
    keys = page_keys(tokens(3 * PAGE))
    mine = p.take(3)
    for page, key in zip(mine, keys, strict=True):
        p.name(page, key)
    assert p.match(keys[:2]) == mine[:2]  # shared with whoever still holds them
    p.release(mine[:2])
    p.release(mine)
    assert p.counts.kept == 3
    assert p.match(keys) == mine
    p.release(mine)
    p.release(p.take(2))  # one was free, one is given up: the last of the prefix
    assert p.match(keys) == mine[:2]


def test_a_hole_ends_the_prefix() -> None:
    p = pool(4)
    keys = page_keys(tokens(3 * PAGE))
    mine = p.take(3)
    p.name(mine[0], keys[0])
    p.name(mine[2], keys[2])
    assert p.match(keys) == mine[:1]


def test_the_same_content_twice_keeps_one_name() -> None:
    p = pool(4)
    (key,) = page_keys(tokens(PAGE))
    first, second = p.take(2)
    p.name(first, key)
    p.name(second, key)
    p.release([second])
    assert p.counts.kept == 0
    p.release([first])
    assert p.counts.kept == 1
    p.forget()
    assert p.counts.free == 4
    assert p.match([key]) == []


@pytest.mark.parametrize(
    ("position", "gone"), [(0, 0), (PAGE, 0), (163, 0), (190, 0), (191, 1), (255, 2), (640, 4)]
)
def test_a_window_lets_pages_go_that_nobody_will_see(position: int, gone: int) -> None:
    p = pool(8, window=128)  # the token at `position` sees from position - 127 on
    mine = p.take(4)
    left = p.passed(list(mine), position)
    assert left == [GONE] * gone + mine[gone:]
    assert p.counts.held == 4 - gone
    p.release(left)
    assert p.counts.held == 0


def test_with_a_window_the_last_pages_are_enough() -> None:
    p = pool(8, window=100)  # two pages
    keys = page_keys(tokens(6 * PAGE))
    mine = p.take(6)
    for i in (0, 2, 3, 5):
        p.name(mine[i], keys[i])
    assert p.match(keys) == [GONE, GONE, mine[2], mine[3]]
    assert p.match(keys[:3]) == mine[:1]


def test_without_a_window_nothing_is_let_go() -> None:
    p = pool()
    mine = p.take(3)
    assert p.passed(mine, 4000) == mine


def test_pages_for_positions() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize("window", [None, 150])
def test_a_long_random_life_loses_no_page(window: int | None) -> None:
    rng = random.Random(3)
    p = pool(24, window)
    alive: list[list[int]] = []
    for _ in range(2000):
        counts = p.counts
        assert counts.held + counts.kept + counts.free == 24
        if alive and rng.random() < 0.5:
            p.release(alive.pop(rng.randrange(len(alive))))
            continue
        text = tokens(rng.randrange(1, 5) * PAGE, first=rng.randrange(3))
        keys = page_keys(text)
        pages = p.match(keys)
        if len(keys) - len(pages) > p.available:
            p.release(pages)
            continue
        pages += p.take(len(keys) - len(pages))
        for page, key in zip(pages, keys, strict=True):
            if page != GONE:
                p.name(page, key)
        alive.append(p.passed(pages, len(text)))
    for pages in alive:
        p.release(pages)
    assert p.counts.held == 0
