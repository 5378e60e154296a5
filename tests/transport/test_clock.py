"""Only time in which a process ran counts as a neighbour's silence."""

from __future__ import annotations

import time

import torch.distributed as dist

from lightning_sg.transport import Downstream, Upstream
from lightning_sg.transport.away import Away
from lightning_sg.transport.clock import RunningClock
from tests.ranks import stop_this_process
from tests.transport.test_link import connected


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


def test_a_process_that_was_stopped_does_not_take_its_neighbour_for_silent() -> None:
    """What arrived meanwhile is not read at once."""

    def work(upstream: Upstream | None, downstream: Downstream | None) -> float:
        longest = 0.0
        dist.barrier()
        if upstream is not None:
            time.sleep(0.5)
            stop_this_process(2.0)
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                longest = max(longest, upstream.inbox.silent)
        dist.barrier()
        for link in filter(None, (upstream, downstream)):
            link.leave()
        return longest

    assert max(connected(work, away=Away(patience=0.8))) < 0.8
