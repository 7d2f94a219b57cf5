"""The threads: every one runs every job once, barriers hold, sleepers wake."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from quantmill.errors import BadRequest
from quantmill.kernels.cpu.jit import c_function
from quantmill.kernels.cpu.memory import atomic_add, field, integers
from quantmill.kernels.cpu.pool import Pool, default_threads, meet, shared_pool


@c_function(4)
def pass_on(job: int, thread: int, threads: int, meeting: int) -> None:
    """Each round every thread adds its left neighbour's number of the round before to its own."""
    rounds = field(job, 0)
    cells = integers(job + 8 * 8, 2 * threads)
    for r in range(rounds):
        old, new = (r % 2) * threads, (1 - r % 2) * threads
        cells[new + thread] = cells[old + (thread + threads - 1) % threads] + 1
        meet(meeting, threads)


@c_function(4)
def count(job: int, thread: int, threads: int, meeting: int) -> None:
    atomic_add(job, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_meet_before_they_go_on(threads: int) -> None:
    rounds = 301
    job = np.zeros(8 + 2 * threads, np.int64)
    job[0] = rounds
    job[8 : 8 + threads] = 1000 * np.arange(threads)
    Pool(threads).run(pass_on.address, job.ctypes.data)
    cells = job[8:].reshape(2, threads)[rounds % 2]
    assert cells.tolist() == [1000 * ((t - rounds) % threads) + rounds for t in range(threads)]


def test_every_thread_runs_every_job_also_after_a_sleep() -> None:
    pool, job = Pool(3), np.zeros(1, np.int64)
    for _ in range(50):
        pool.run(count.address, job.ctypes.data)
    time.sleep(0.2)  # long enough for the threads to leave compiled code
    for _ in range(3):
        pool.run(count.address, job.ctypes.data)
        time.sleep(0.05)
    assert job[0] == 3 * 53


@c_function(4)
def take(job: int, thread: int, threads: int, meeting: int) -> None:
    """Take numbers until there are none, and add them up."""
    taken = atomic_add(job, 1)
    while taken < field(job, 2):
        atomic_add(job + 8, taken)
        taken = atomic_add(job, 1)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_loose_job_is_done_whoever_comes(threads: int) -> None:
    pool, ends = Pool(threads), np.array([7, 100, 1000] * 100)
    counted = np.zeros(1, np.int64)
    for i, end in enumerate(ends):
        job = np.array([0, 0, end], np.int64)
        pool.run(take.address, job.ctypes.data, loose=True)
        assert job[1] == end * (end - 1) // 2
        after = job.copy()
        if i % 10 == 0:
            pool.run(count.address, counted.ctypes.data)  # all threads are needed, also those that came late
            time.sleep(0.001)
        assert np.array_equal(job, after)  # nobody is inside any more
    assert counted[0] == 30 * threads


def test_callers_take_turns() -> None:
    pool, job = Pool(2), np.zeros(1, np.int64)

    def call() -> None:
        for _ in range(100):
            pool.run(count.address, job.ctypes.data)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert job[0] == 3 * 100 * 2


def test_a_pool_ends_its_threads_when_it_is_dropped() -> None:
    before = set(threading.enumerate())
    pool = Pool(4)
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3
    del pool
    for thread in mine:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in mine)


def test_the_number_of_threads() -> None:
    assert default_threads() >= 1
    assert shared_pool(2) is shared_pool(2)
    with pytest.raises(BadRequest, match="--threads 1"):
        Pool(0)
