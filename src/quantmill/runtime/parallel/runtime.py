"""A model on several ranks as one `Runtime`: the first rank is this process, the others are started by it.

    generate, bench, engine, server
        ParallelRuntime        sends every pass to the others, then runs its own part of it
        CpuRuntime, GpuRuntime     of this rank: a part of every layer, sums over all ranks after o and down

A rank that ends, for whatever reason, ends the pass under way, and every later one, with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from quantmill.errors import BadRequest, QuantmillError
from quantmill.runtime.interface import Floats, Logits, Piece, Runtime, RuntimeFacts
from quantmill.runtime.parallel.messages import pieces_to
from quantmill.runtime.parallel.opening import Asked, open_part

WORKER = "quantmill.runtime.parallel.worker"
GRACE = 10.0  # seconds: for ranks to end when asked, and for a pass to notice that one has died

Process = subprocess.Popen[bytes]


class ParallelRuntime:
    """`Runtime` (interface.py) over several processes. Use `start`."""

    def __init__(self, local: Runtime, workers: Workers, facts: RuntimeFacts) -> None:
        self._local, self._workers, self.facts = local, workers, facts

    @classmethod
    def start(cls, asked: Asked) -> ParallelRuntime:
        """Start the other ranks and open the model on all. `asked`: of the first rank, `meeting` left empty.

        Raises what opening raises, and RankLost.
        """
        workers = Workers(asked)
        try:
            with workers.watched():
                local = open_part(replace(asked, meeting=workers.meeting))
        except BaseException:
            workers.close()
            raise
        facts = local.facts
        own = facts.bytes_per_token * (asked.size if asked.device == "cpu" else 1)  # GPUs read side by side
        name = f"{facts.name}, {asked.size} ranks"
        return cls(local, workers, replace(facts, name=name, bytes_per_token=own))

    def forward(self, pieces: Sequence[Piece]) -> Logits:
        """See `Runtime.forward`. Raises RankLost where a rank has gone."""
        with self._workers.watched():
            self._workers.tell(pieces, hidden=False)
            return self._local.forward(pieces)

    def hidden(self, pieces: Sequence[Piece]) -> Floats:
        """See `Runtime.hidden`."""
        with self._workers.watched():
            self._workers.tell(pieces, hidden=True)
            return self._local.hidden(pieces)

    def close(self) -> None:
        """End the other ranks and give this one's memory back."""
        self._workers.close()
        self._local.close()


class Workers:
    """The processes of all ranks but the first."""

    def __init__(self, asked: Asked) -> None:
        self.meeting = tempfile.mkdtemp(prefix="quantmill-ranks-")
        self._passing, self._closing, self._on_gpu = False, False, asked.device == "cuda"
        self._processes = [_start(replace(asked, rank=r, meeting=self.meeting)) for r in range(1, asked.size)]
        self._end = weakref.finalize(self, _end, self._processes, self.meeting)
        for rank, process in enumerate(self._processes, 1):
            watch = (weakref.ref(self), rank, process, asked.size)
            threading.Thread(target=_watch, args=watch, daemon=True, name=f"quantmill-rank-{rank}").start()

    def tell(self, pieces: Sequence[Piece], hidden: bool) -> None:
        """Send a pass to all; they are in it when this returns or soon after."""
        line = json.dumps({"hidden": hidden, "pieces": pieces_to(pieces)}).encode() + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While all ranks work together: what a death among them raises here, as RankLost."""
        self._passing = True
        try:
            yield
        except BadRequest:  # all refuse it, before anything is summed
            raise
        except (OSError, QuantmillError) as error:
            lost = self.lost(wait=1.0)
            if lost is None:
                raise
            raise _rank_lost(lost) from error
        finally:
            self._passing = False

    def lost(self, wait: float = 0.0) -> str | None:
        """Which rank has ended and how, if one has, or does within so many seconds."""
        for rank, process in enumerate(self._processes, 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            if process.returncode is not None:
                return _how(rank, len(self._processes) + 1, process.returncode)
        return None

    def close(self) -> None:
        """End them all. May be called twice."""
        self._closing = True
        self._end()

    def stuck(self) -> bool:
        """Of a rank's death: whether nobody has drawn the consequence after a time in which they should have.

        On a GPU passes end for the host before they are done, so that waiting for a token may be what never ends.
        """
        threading.Event().wait(0.0 if self._closing else GRACE)
        return not self._closing and (self._passing or self._on_gpu)


def _start(asked: Asked) -> Process:
    process = subprocess.Popen(
        [sys.executable, "-m", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(asked)).encode() + b"\n")
    process.stdin.flush()
    return process


def _watch(workers: weakref.ref[Workers], rank: int, process: Process, size: int) -> None:
    """A GPU waits for ever for a rank that is gone, and nothing can be raised there: then this process ends."""
    process.wait()
    owner = workers()
    if owner is not None and owner.stuck():
        print(f"quantmill: {_rank_lost(_how(rank, size, process.returncode))}", file=sys.stderr, flush=True)
        os._exit(1)


def _how(rank: int, size: int, code: int) -> str:
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"rank {rank} of {size} {ended}"


def _rank_lost(what: str) -> QuantmillError:
    from quantmill.runtime.parallel.team import RankLost

    return RankLost(
        f"{what}, so the model cannot go on: start again, with as many ranks as there is room for"
    )


def _end(processes: Sequence[Process], meeting: str) -> None:
    for process in processes:
        with contextlib.suppress(OSError):  # it is gone
            assert process.stdin is not None
            process.stdin.close()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(Path(meeting), ignore_errors=True)
