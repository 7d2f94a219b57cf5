"""Passes of one piece of many tokens (prompts). Knows no graph's making and no sampling.

What a pass reads lies in one buffer on the GPU. The calls of a pass can take longer than its work, so from a
length's second pass on it is a CUDA graph, which serves several lengths: rows behind the last token are filler.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantmill.runtime.gpu import prompts
from quantmill.runtime.gpu.layers import MANY_ROWS, Model, PieceAttention, final_states, logits_of
from quantmill.runtime.gpu.ops import tile_rows
from quantmill.runtime.gpu.steps import Steps
from quantmill.runtime.gpu.tensors import Rows
from quantmill.runtime.gpu.trial import torch_attends

log = logging.getLogger(__name__)

AT_ONCE = 2048  # tokens of one pass
GRAPHED = 2048  # tokens of the largest graph; 0: none
FILLED = ((512, 64), (GRAPHED, 256))  # up to so many tokens a graph serves this many lengths
SOMEWHERE = 1 << 29  # a start for graphs that serve every start
_SLOTS = 2  # inputs on their way at once


class Pieces:
    """Runs pieces of one model, one after the other."""

    def __init__(self, model: Model, steps: Steps, lines: int) -> None:
        self._model, self._steps, self._lines = model, steps, lines
        self._step = tile_rows(model.heads[0])
        device = model.weights.embedding.device
        size = self._size(AT_ONCE)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_SLOTS)]
        self._arrived: list[torch.cuda.Event | None] = [None] * _SLOTS
        self._turn = 0
        self._there = torch.zeros(size, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(AT_ONCE, dtype=torch.int32, device=device)
        self._torch_is_right: bool | None = None  # not tried yet
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._seen: Counter[tuple[int, bool]] = Counter()

    def states(self, tokens: Sequence[int], start: int, pages: Sequence[int]) -> Tensor:
        """Final states of at most AT_ONCE tokens."""
        self._send(tokens, start, pages, len(tokens))
        return self._body(len(tokens), start, self._torch_attends(len(tokens), start), newest=False)

    def newest(self, tokens: Sequence[int], start: int, pages: Sequence[int]) -> Tensor:
        """Logits (1, vocab) after the last of at most AT_ONCE tokens."""
        count = len(tokens)
        if count > GRAPHED or not self._steps.captures or self._model.team is not None:
            self._send(tokens, start, pages, count)
            return self._last(count, start, self._torch_attends(count, start))
        rows = _filled(count)
        key = rows, self._torch_attends(rows, start)
        self._send(tokens, start, pages, rows)
        self._seen[key] += 1
        if self._seen[key] > 1 and key not in self._graphs:
            self._graphs[key] = self._captured(*key)
        found = self._graphs.get(key)
        if found is None:
            return self._eager(key)
        graph, logits = found
        graph.replay()
        return logits.clone()  # the next piece overwrites it

    def _eager(self, key: tuple[int, bool]) -> Tensor:
        """A pass without a graph. What a first one took is given back: the next of its length is a graph."""
        logits = self._last(key[0], *_graphs_start(key[1]))
        if self._seen[key] == 1:
            torch.cuda.empty_cache()
        return logits

    def _captured(self, rows: int, by_torch: bool) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """A pass as a graph; None where it cannot be one."""
        try:
            made = self._steps.capture(lambda: self._last(rows, *_graphs_start(by_torch)))
        except RuntimeError as failure:  # something of a pass does not let itself be captured here
            log.warning("prompts of %d tokens do without a CUDA graph: %s", rows, failure)
            return None
        torch.cuda.empty_cache()  # what the same pass took without a graph
        return made

    def close(self) -> None:
        """Let the graphs and their memory go."""
        self._graphs.clear()

    def _torch_attends(self, rows: int, start: int) -> bool:
        """Whether torch's attention serves such a pass. Tried when first wanted: to load it takes time."""
        if not self._model.torch_prompts or start or rows < prompts.LEAST_ROWS:
            return False
        if self._torch_is_right is None:
            device = self._there.device
            self._torch_is_right = device.type != "cuda" or torch_attends(
                self._model.heads[0], self._model.dtype
            )
        return self._torch_is_right

    def _last(self, rows: int, start: int, by_torch: bool) -> Tensor:
        return logits_of(self._model, self._body(rows, start, by_torch, newest=True))

    def _body(self, rows: int, start: int, by_torch: bool, newest: bool) -> Tensor:
        """A pass over what lies in the buffer."""
        ids, positions, last, tiles, line = torch.split(self._there[: self._size(rows)], self._parts(rows))
        seen = Rows(ids[:rows], positions[:rows], self._zeros[:rows], line.view(1, -1))
        attention = PieceAttention(seen, tiles.view(-1, 4), start, by_torch)
        return final_states(
            self._model, seen.tokens, MANY_ROWS, attention, newest=last[:1] if newest else None
        )

    def _parts(self, rows: int) -> list[int]:
        """Numbers in the buffer: tokens, positions, the newest row, tiles, pages; all begin at 16 bytes."""
        filled = -(-rows // 4) * 4
        return [filled, filled, 4, 4 * -(-rows // self._step), self._lines]

    def _size(self, rows: int) -> int:
        return sum(self._parts(rows))

    def _send(self, tokens: Sequence[int], start: int, pages: Sequence[int], rows: int) -> None:
        """Tokens into the buffer of a pass of so many rows; the rest is filler."""
        count, parts = len(tokens), self._parts(rows)
        ids, positions, last, tiles, line = np.split(np.zeros(sum(parts), np.int32), np.cumsum(parts)[:-1])
        ids[:count], positions[:] = tokens, -1
        positions[:count] = np.arange(start, start + count)
        last[0] = count - 1
        firsts = np.arange(0, count, self._step)
        cut = tiles.reshape(-1, 4)[: len(firsts)]
        cut[:, 0], cut[:, 1], cut[:, 2] = firsts, np.minimum(self._step, count - firsts), start + firsts
        used = min(len(pages), self._lines)
        line[:], line[:used] = -1, pages[:used]
        self._copy(np.concatenate([ids, positions, last, tiles, line]))

    def _copy(self, numbers: np.ndarray) -> None:
        self._turn = (self._turn + 1) % _SLOTS
        event, host = self._arrived[self._turn], self._hosts[self._turn]
        if event is not None:
            event.synchronize()  # the copy from this buffer before last is through
        host.numpy()[: len(numbers)] = numbers
        self._there[: len(numbers)].copy_(host[: len(numbers)], non_blocking=True)
        if self._there.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._arrived[self._turn] = event


def _filled(count: int) -> int:
    """Rows of the graph for so many tokens."""
    step = next(step for most, step in FILLED if count <= most)
    return -(-count // step) * step


def _graphs_start(by_torch: bool) -> tuple[int, bool]:
    """The start that a graph is made for, and whether torch's attention serves it: only at a text's beginning."""
    return (0, True) if by_torch else (SOMEWHERE, False)
