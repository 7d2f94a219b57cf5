"""A few threads that wait inside compiled code, and the barrier they meet at.

A job is a C function f(job, thread, threads, meeting), all int64, that every thread runs once; `meeting` is
what `meet` takes. A loose job, in which nobody meets, does not wait for threads that another program keeps from
starting: when thread 0 has done what there was, the gate closes, and who comes late goes away.

Idle threads watch for work for about a millisecond, giving way to others, then sleep in Python. How work is
split is the job's own: by thread number (`share`), or by tickets (`claim`), which keeps everyone busy when
another program takes a processor away. Knows no kernels.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import cache

import numpy as np
from numpy.typing import NDArray

from quantmill.errors import BadRequest
from quantmill.kernels.cpu.jit import call4, entry, inlined
from quantmill.kernels.cpu.memory import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    breathe,
    field,
    give_way,
)

# The control block: int64 cells, those that different threads write 128 bytes apart.
_EPOCH, _FUNCTION, _JOB, _STOP = 0, 1, 2, 3
_DONE, _ARRIVED, _MEETINGS, _GATE, _PARKED = 16, 32, 48, 64, 80
_STEP = 16
_TURN, _CLOSED = 1 << 16, 1 << 15  # the gate: epoch * _TURN + threads inside, + _CLOSED
_PATIENCE = 20_000  # looks at the epoch before a thread goes to sleep
_PARTS = 8  # that `claim` makes of things for each thread
_POLITE = 64  # looks between two offers of the processor to other threads


@inlined
def meet(meeting: int, threads: int) -> None:
    """Return when all threads of the job have called this; everything they wrote before is then visible."""
    if threads == 1:
        return
    place = meeting + 8 * 48
    turn = atomic_load(place)
    if atomic_add(meeting + 8 * 32, 1) == threads - 1:
        atomic_store(meeting + 8 * 32, 0)
        atomic_store(place, turn + 1)
        return
    looks = 0
    while atomic_load(place) == turn:
        looks += 1
        breathe()
        if looks % _POLITE == 0:
            give_way()


@inlined
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The part [first, last) of `count` things that is this thread's."""
    return count * thread // threads, count * (thread + 1) // threads


@inlined
def claim(ticket: int, count: int, threads: int) -> tuple[int, int]:
    """The next part [first, last) of `count` things; empty when all are taken. `ticket`: an int64, 0 at
    first."""
    if threads == 1:
        first, size = atomic_load(ticket), count
        atomic_store(ticket, count)
    else:
        size = (count + _PARTS * threads - 1) // (_PARTS * threads)
        first = atomic_add(ticket, size)
    return min(first, count), min(first + size, count)


@inlined
def _enter(control: int, epoch: int) -> bool:
    """Whether this thread takes part in the job of that epoch."""
    gate = atomic_load(control + 8 * _GATE)
    while gate // _TURN == epoch and not gate & _CLOSED:
        before = atomic_swap(control + 8 * _GATE, gate, gate + 1)
        if before == gate:
            return True
        gate = before
    return False


@entry
def _serve(control: int, thread: int, threads: int, seen: int) -> int:
    """Run jobs as thread number `thread`; returns the last epoch seen when it is time to sleep, -1 to end."""
    parked = control + 8 * (_PARKED + _STEP * thread)
    atomic_store(parked, 0)
    while True:
        looks = 0
        while atomic_load(control) == seen:
            looks += 1
            breathe()
            if looks % _POLITE == 0:
                give_way()
            if looks > _PATIENCE:
                atomic_store(parked, 1)
                if atomic_load(control) == seen:
                    return seen
                atomic_store(parked, 0)
        seen = atomic_load(control)
        if field(control, _STOP):
            return -1
        if _enter(control, seen):
            call4(field(control, _FUNCTION), (field(control, _JOB), thread, threads, control))
            atomic_add(control + 8 * _DONE, 1)


@entry
def _start(control: int, threads: int, function: int, job: int, loose: int) -> int:
    """Publish a job; where nobody sleeps also do it. Returns the number of sleepers: wake them, call
    `_share`."""
    atomic_store(control + 8 * _FUNCTION, function)
    atomic_store(control + 8 * _JOB, job)
    atomic_store(control + 8 * _DONE, 0)
    epoch = atomic_load(control) + 1
    atomic_store(control + 8 * _GATE, epoch * _TURN)
    atomic_store(control, epoch)
    sleepers = 0
    for thread in range(1, threads):
        sleepers += atomic_load(control + 8 * (_PARKED + _STEP * thread))
    if sleepers == 0:
        _work(control, threads, function, job, loose)
    return sleepers


@entry
def _share(control: int, threads: int, function: int, job: int, loose: int) -> None:
    _work(control, threads, function, job, loose)


@inlined
def _work(control: int, threads: int, function: int, job: int, loose: int) -> None:
    """Thread 0's part of a published job, and the wait for the others: all, or those that are inside."""
    call4(function, (job, 0, threads, control))
    inside = threads - 1
    if loose:
        inside = atomic_add(control + 8 * _GATE, _CLOSED) % _CLOSED
    looks = 0
    while atomic_load(control + 8 * _DONE) < inside:
        looks += 1
        breathe()
        if looks % _POLITE == 0:
            give_way()


class Pool:
    """`threads` workers, the caller being the first of them. Jobs from several callers run one after
    another."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise BadRequest(f"{threads} threads; use --threads 1 or more")
        self.threads = threads
        self._block: NDArray[np.int64] = np.zeros(_PARKED + _STEP * threads, np.int64)
        self._control = int(self._block.ctypes.data)
        self._turn = threading.Lock()
        self._wakes = [threading.Event() for _ in range(threads)]
        for thread in range(1, threads):
            work = (self._block, self._wakes[thread], thread, threads)
            threading.Thread(target=_live, args=work, daemon=True, name=f"quantmill-{thread}").start()
        weakref.finalize(self, _stop, self._block, self._wakes)

    def run(self, function: int, job: int, *, loose: bool = False) -> None:
        """Run the C function at an address on all threads, with the address of its job record.

        loose: on those that come before the others have done everything; nobody may `meet`.
        """
        given = (self._control, self.threads, function, job, int(loose))
        with self._turn:
            if _start(*given):
                for thread in range(1, self.threads):
                    if self._block[_PARKED + _STEP * thread]:
                        self._wakes[thread].set()
                _share(*given)


def _live(block: NDArray[np.int64], wake: threading.Event, thread: int, threads: int) -> None:
    seen = 0
    while seen >= 0:
        seen = _serve(int(block.ctypes.data), thread, threads, seen)
        if seen >= 0:
            wake.wait()
            wake.clear()


def _stop(block: NDArray[np.int64], wakes: list[threading.Event]) -> None:
    block[_STOP] = 1
    block[_EPOCH] += 1
    for wake in wakes:
        wake.set()


def default_threads() -> int:
    """One thread per physical core that this process may use."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = psutil.cpu_count(logical=False) or usable
    return max(1, min(usable, cores, _quota()))


def _quota() -> int:
    """Whole processors that the control group allows; a large number where it does not say."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            limit, period = file.read().split()
    except OSError:
        return 1 << 20
    return 1 << 20 if limit == "max" else max(1, int(limit) // int(period))


@cache
def shared_pool(threads: int) -> Pool:
    """The process's pool of that many threads. A forked child starts its own."""
    return Pool(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared_pool.cache_clear)
