"""Who holds which page of the cache, and which pages a new prompt can take over. Knows no tensors.

A full page is named by a digest of all tokens up to its end, so equal names mean equal content. Pages that nobody
holds but that have a name stay as they are until room is needed: the one let go longest ago is given up first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from quantmill.errors import BadRequest
from quantmill.runtime.interface import PAGE, RuntimeFacts

Key = bytes
GONE = -1  # the place of a page that a sliding window has let go


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Where the pages are. `held + kept + free == pages`."""

    pages: int
    held: int  # in use by at least one sequence
    kept: int  # in nobody's use, content still known
    free: int


class PagePool:
    """The pages of one runtime. Not for use from several threads at once."""

    def __init__(self, facts: RuntimeFacts) -> None:
        self.pages = facts.pages
        self.window_pages = None if facts.window is None else -(-facts.window // PAGE)
        self._window = facts.window
        self._free = list(range(facts.pages - 1, -1, -1))
        self._holders = [0] * facts.pages
        self._by_key: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest let go first

    @property
    def available(self) -> int:
        """Pages that `take` can give, those with known content included."""
        return len(self._free) + len(self._kept)

    @property
    def counts(self) -> PageCounts:
        return PageCounts(self.pages, self.pages - self.available, len(self._kept), len(self._free))

    def take(self, count: int) -> list[int]:
        """Fresh pages, each with one holder. Raises BadRequest where there are not so many: ask `available`."""
        if count > self.available:
            raise BadRequest(
                f"{count} cache pages are needed and {self.available} are there: give the cache more tokens"
            )
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._by_key[self._key_of.pop(page)]
        self._holders[page] = 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages in the order of their positions; GONE is passed over.

        The last ones will be given up first, because a prefix is worth more than what follows it.
        """
        for page in reversed([p for p in pages if p != GONE]):
            if self._holders[page] <= 0:
                raise ValueError(f"page {page} is let go by nobody who holds it")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, key: Key) -> None:
        """From now on `page` holds the tokens behind `key`. Nothing happens where another page does already."""
        if key not in self._by_key and page not in self._key_of:
            self._by_key[key] = page
            self._key_of[page] = key

    def match(self, keys: Sequence[Key], step: int = 1) -> list[int]:
        """Pages for the longest prefix of `keys` that is there, one holder more for each; GONE before the window.

        With a sliding window the pages of the last window are enough. step: the prefix has a multiple of so many.
        """
        found = [self._by_key.get(key, GONE) for key in keys]
        length = _usable(found, self.window_pages, step)
        # After n full pages the next token sees window - 1 positions back: as many pages as the window has.
        first = 0 if self.window_pages is None else max(0, length - self.window_pages)
        pages = [GONE] * first + found[first:length]
        for page in pages[first:]:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return pages

    def passed(self, pages: list[int], position: int) -> list[int]:
        """Let the pages go that no token from `position` on can see -> the list with GONE in their places."""
        if self._window is None or position < self._window:
            return pages
        last = min((position - self._window + 1) // PAGE, len(pages))
        gone = [p for p in pages[: max(0, last)] if p != GONE]
        if not gone:
            return pages
        self.release(gone)
        return [GONE] * last + pages[last:]

    def forget(self) -> None:
        """Give up all content that nobody holds."""
        for page in list(self._kept):
            del self._by_key[self._key_of.pop(page)]
            self._free.append(page)
        self._kept.clear()


def _usable(found: list[int], window_pages: int | None, step: int) -> int:
    """How many pages from the start can be taken over: all of them, or with a window the last few, are there."""
    run = best = 0
    for i, page in enumerate(found):
        run = run + 1 if page != GONE else 0
        enough = run == i + 1 or (window_pages is not None and run >= window_pages)
        if enough and (i + 1) % step == 0:
            best = i + 1
    return best


def page_keys(tokens: Sequence[int], known: Sequence[Key] = (), salt: bytes = b"") -> list[Key]:
    """The names of all full pages of `tokens`; those of the first pages may be `known` already.

    A digest and not a hash: whoever could make two prompts collide could read another's answer.
    """
    keys = list(known)
    for i in range(len(keys), len(tokens) // PAGE):
        block = np.asarray(tokens[i * PAGE : (i + 1) * PAGE], np.int64).tobytes()
        keys.append(hashlib.blake2b((keys[-1] if keys else salt) + block, digest_size=16).digest())
    return keys


def pages_for(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)
