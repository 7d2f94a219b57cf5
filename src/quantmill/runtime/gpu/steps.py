"""Decode steps: rows of one token each, a whole step in one CUDA graph per batch size and kind.

Inputs (tokens, positions, pages) lie in one buffer on the GPU that a graph reads; a step copies them there and
replays. Without a GPU (the interpreter) the same calls run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from quantmill.runtime.gpu import drawing, ops
from quantmill.runtime.gpu.batches import SIZES, fast_batches
from quantmill.runtime.gpu.fused import fused_logits, fused_states, normed
from quantmill.runtime.gpu.layers import FEW_ROWS, Model, RowsAttention, final_states, logits_of
from quantmill.runtime.gpu.tensors import Rows, Scratch
from quantmill.runtime.interface import Piece

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_ROWS = BUCKETS[-1]
_SLOTS = 2  # inputs on their way at once


class Kind(Enum):
    """What a step is for."""

    ALONE = "one token of every sequence"
    TOGETHER = "several tokens of a sequence"
    STATES = "several tokens of a sequence, for their final states"
    DRAWING = "one token of every sequence, and the next is drawn and put in its place"


class Inputs:
    """What a step reads: on the host (pinned) and on the device, in one piece each."""

    def __init__(self, lines: int, device: torch.device) -> None:
        self._lines = lines  # pages of one sequence
        size = MOST_ROWS * (3 + lines)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_SLOTS)]
        self._arrived: list[torch.cuda.Event | None] = [None] * _SLOTS
        self._turn = 0
        self.there = torch.zeros(size, dtype=torch.int32, device=device)

    def rows(self, count: int) -> Rows:
        """Views of the device's buffer for a step of `count` rows."""
        tokens, positions, sequences = (self.there[i * MOST_ROWS : i * MOST_ROWS + count] for i in range(3))
        pages = self.there[3 * MOST_ROWS :].view(MOST_ROWS, self._lines)
        return Rows(tokens, positions, sequences, pages)

    def send(self, pieces: Sequence[Piece], count: int) -> None:
        """Put the pieces' tokens into the first rows of `count`; the rest is filler."""
        self._turn = (self._turn + 1) % _SLOTS
        event, host = self._arrived[self._turn], self._hosts[self._turn]
        if event is not None:
            event.synchronize()  # the copy from this buffer before last is through
        numbers = host.numpy()
        header, pages = numbers[: 3 * MOST_ROWS].reshape(3, MOST_ROWS), numbers[3 * MOST_ROWS :]
        header[0, :count], header[1, :count], header[2, :count] = 0, -1, 0
        at = 0
        for line, piece in enumerate(pieces):
            rows = slice(at, at + len(piece.tokens))
            header[0, rows] = piece.tokens
            header[1, rows] = np.arange(piece.start, piece.start + len(piece.tokens))
            header[2, rows] = line
            begin, used = line * self._lines, min(len(piece.pages), self._lines)
            pages[begin : begin + used] = piece.pages[:used]
            at = rows.stop
        sent = 3 * MOST_ROWS + len(pieces) * self._lines
        self.there[:sent].copy_(host[:sent], non_blocking=True)
        if self.there.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._arrived[self._turn] = event


class Steps:
    """Runs decode steps of one model. The next step overwrites a step's result."""

    def __init__(self, model: Model, lines: int) -> None:
        self._model = model
        device = model.weights.embedding.device
        self.inputs = Inputs(lines, device)
        self._scratches: dict[int, Scratch] = {}  # by bucket, made when the first step of it is
        self.draws = drawing.make_draws(MOST_ROWS, device)
        self._alike = model.alike or SIZES[-1]  # rows of a step that have the same bits
        self.at_once = MOST_ROWS if fast_batches() else self._alike
        self._graphs: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        captured = device.type == "cuda" and (model.team is None or model.team.captured)
        self._pool = torch.cuda.graph_pool_handle() if captured else None
        # torch.distributed watches its sums from a thread of its own, also while a graph is captured
        self._mode = "global" if model.team is None else "thread_local"

    @property
    def captures(self) -> bool:
        """Whether passes become graphs here."""
        return self._pool is not None

    def run(self, pieces: Sequence[Piece], logits: bool = True) -> Tensor:
        """One step -> logits (tokens of all pieces, vocab), or final states; overwritten by the next step."""
        count = sum(len(p.tokens) for p in pieces)
        bucket = bucket_of(count)
        kind = Kind.STATES if not logits else Kind.ALONE if count == len(pieces) else Kind.TOGETHER
        self.ready(bucket, kind)
        self.inputs.send(pieces, bucket)
        return self.replay(bucket, kind)[:count]

    def ready(self, bucket: int, kind: Kind) -> None:
        """Make the graph now if it is not there."""
        if self._pool is not None and (bucket, kind) not in self._graphs:
            self.inputs.send([], bucket)  # filler only: running it changes nothing
            self._graphs[bucket, kind] = self.capture(lambda: self._body(bucket, kind))

    def replay(self, bucket: int, kind: Kind) -> Tensor:
        """The step on what lies in `inputs` -> logits, or states, of every row. It has to be ready."""
        if self._pool is None:
            return self._body(bucket, kind)
        graph, found = self._graphs[bucket, kind]
        graph.replay()
        return found

    def capture(self, body: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The body as a graph. It runs once before, which compiles its kernels."""
        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=self._mode):
            found = body()
        return graph, found

    def close(self) -> None:
        """Let the graphs and their memory go."""
        self._graphs.clear()

    def _body(self, bucket: int, kind: Kind) -> Tensor:
        rows = self.inputs.rows(bucket)
        if bucket not in self._scratches:
            self._scratches[bucket] = ops.make_scratch(bucket, self._model.heads[0], rows.tokens.device)
        attention = RowsAttention(rows, self._scratches[bucket], alone=kind in (Kind.ALONE, Kind.DRAWING))
        if self._model.fused and bucket <= self._alike:
            x, squares = fused_states(self._model, rows.tokens, attention)
            if kind is Kind.STATES:
                return normed(self._model, x, squares)
            logits = fused_logits(self._model, x, squares)
        else:
            states = final_states(self._model, rows.tokens, FEW_ROWS, attention)
            if kind is Kind.STATES:
                return states
            logits = logits_of(self._model, states)
        if kind is Kind.DRAWING:
            drawing.draw(logits, self.draws, rows)
        return logits


def bucket_of(rows: int) -> int:
    """Rows of the graph that serves so many."""
    return next(b for b in BUCKETS if b >= rows)
