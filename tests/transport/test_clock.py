"""Only time in which a process ran counts as a neighbour's silence."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_sg._compat import default_store
from lightning_sg.transport import ProcessGrid, Watch, open_chain
from lightning_sg.transport.away import Away
from lightning_sg.transport.clock import RunningClock
from tests.ranks import run_ranks


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_clock_that_is_read_often_counts_all_seconds() -> None:
    time = Time()
    clock = RunningClock(0.5, time)
    for _reading in range(40):
        time.seconds += 0.25
        last = clock.now()
    assert last == 10.0


def test_a_pause_counts_no_more_than_the_longest_time_between_two_readings() -> None:
    time = Time()
    clock = RunningClock(0.5, time)
    time.seconds += 3600
    assert clock.now() == 0.5
    assert clock.now() == 0.5
    time.seconds += 0.25
    assert clock.now() == 0.75


def stop_this_process(seconds: float) -> None:
    waker = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()


def test_a_process_that_was_stopped_does_not_take_its_neighbour_for_silent() -> None:
    """What arrived meanwhile is not read at once."""

    def work() -> float:
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
        grid = ProcessGrid(((0, 1),), 0, dist.get_rank(), torch.device("cpu"), "gloo", 20.0)
        chain = open_chain(grid, default_store(), Watch(20.0, away=Away(patience=0.8)), ["first", "second"])
        [link] = chain.links
        dist.barrier()
        longest = 0.0
        if chain.upstream is not None:
            time.sleep(0.5)
            stop_this_process(2.0)
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                longest = max(longest, link.inbox.silent)
        dist.barrier()
        link.leave()
        return longest

    assert max(run_ranks(2, work)) < 0.8
