"""Processes that meet: all of one attempt, or an error that names who is missing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore

from lightning_sg._compat import PrefixStore, TCPStore
from lightning_sg.errors import StageLostError
from lightning_sg.transport import RunStore, StoreAddress, call_roll, interruptible
from lightning_sg.transport.hanging_up import hang_up, place_of
from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).parents[2]


def rank() -> int:
    return int(os.environ["RANK"])


def here(timeout: float = 3.0, processes: int | None = None) -> RunStore:
    """The roll call of this rank, by the environment that run_ranks makes."""
    count = processes or int(os.environ["WORLD_SIZE"])
    return call_roll(StoreAddress.of(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank(), count), timeout)


def wait_for_all(run: RunStore) -> None:
    """The store ends with rank 0."""
    run.post(f"done/{run.rank}", "")
    deadline = time.monotonic() + 10
    while any(run.read(f"done/{other}") is None for other in range(run.processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)


def test_all_get_the_same_attempt_and_a_store_of_their_own() -> None:
    def work() -> Any:
        run = here(20)
        run.post(f"note/{rank()}", f"from {rank()}")
        wait_for_all(run)
        return run.attempt, run.read("note/1") if rank() == 0 else "from 1", run.read("note/9")

    first, *others = run_ranks(3, work)
    assert first[1:] == ("from 1", None)
    assert all(other == first for other in others)


def test_ranks_that_never_come_are_named() -> None:
    def work() -> None:
        if rank() == 0:
            here(1.0)

    error, *_ = run_ranks(3, work, may_fail=True)
    assert error.kind == "StageLostError"
    assert error.message.startswith("rank 0: ranks 1, 2 did not come within 1 s (3 processes meet at 127.0.0.1:")


def test_a_rank_0_that_never_comes_is_named() -> None:
    def work() -> None:
        if rank() == 1:
            here(1.0)

    _, error = run_ranks(2, work, may_fail=True)
    assert error.kind == "StageLostError"
    assert "rank 1: rank 0, which keeps the store, did not come within 1 s" in error.message


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_meanwhile_is_named(how: signal.Signals, lost: int) -> None:
    def work() -> Any:
        began = time.monotonic()
        if rank() == 1:
            time.sleep(1.0)
        if rank() == lost:
            end = os.getpid()
            if os.fork() == 0:  # outside of this process, which may be stopped
                time.sleep(0.4)
                os.kill(end, how)
                time.sleep(6)
                os.kill(end, signal.SIGKILL)
                os._exit(0)
        try:
            here(2.5)
        except StageLostError as error:
            return str(error), time.monotonic() - began
        return None

    results = run_ranks(3, work, may_fail=True)
    for number, result in enumerate(results):
        if number != lost:
            text, seconds = result
            assert f"rank {lost}" in text
            assert seconds < 10


def test_local_rank_left_in_the_environment_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(StageLostError, match=r"LOCAL_RANK is set in the environment.*unset it"):
        call_roll(StoreAddress("127.0.0.1", free_port(), 0, 2), 0.5)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("waiting", [0, 1])
def test_a_waiting_rank_hears_signals(waiting: int, how: signal.Signals) -> None:
    class Heard(BaseException):
        pass

    def hear(number: int, frame: Any) -> None:
        raise Heard

    def work() -> Any:
        if rank() != waiting:
            return None
        began = time.monotonic()
        try:
            signal.signal(how, hear)
            threading.Timer(0.5, os.kill, (os.getpid(), how)).start()
            here(20)
        except Heard:
            return time.monotonic() - began
        return None

    assert run_ranks(2, work)[waiting] < 3


def test_what_dead_attempts_left_is_no_news() -> None:
    """As torchrun's agent leaves it: names, a proposal, agreements and a failure, in one store for all attempts."""
    port = free_port()
    server = TCPStore("127.0.0.1", port, 1, True, wait_for_workers=False)
    old = PrefixStore("lightning_sg", server)
    old.set("proposal", '{"0": "dead", "1": "dead"}')
    for number in range(2):
        old.set(f"here/{number}", "dead")

    def work() -> Any:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
        if rank() == 1:
            time.sleep(1.0)
        run = here(8)
        news = run.failed()
        run.fail("of this attempt")
        return run.attempt, news

    attempts = []
    for _ in range(2):  # the second attempt finds what the first left
        first, second = run_ranks(2, work)
        assert first[0] == second[0]
        assert not first[1] or first[1] == {1: "of this attempt"}
        attempts.append(first[0])
    assert attempts[0] != attempts[1]


def test_a_process_that_takes_the_place_of_a_dead_one_is_counted_and_the_dead_one_not(tmp_path: Path) -> None:
    def work() -> Any:
        if rank() == 2:
            time.sleep(2)
        if rank() == 1:
            dead = os.fork()
            if dead == 0:
                threading.Timer(0.8, os._exit, (1,)).start()
                here(8)
            os.waitpid(dead, 0)
        run = here(8)
        wait_for_all(run)
        return run.attempt

    first, second, third = run_ranks(3, work)
    assert first == second == third


def test_a_process_that_comes_later_joins_an_attempt_that_is_open_to_that() -> None:
    def work() -> Any:
        run = here(20)
        if rank() == 0:
            run.open_to_others()
        if rank() == 1:  # as soon as that is known, and knowing nothing of the process before it
            while not PrefixStore("lightning_sg", run.keeper).check(["running"]):
                time.sleep(0.02)
            run = here(20)
        wait_for_all(run)
        return run.attempt, run.rejoins

    first, second, third = run_ranks(3, work)
    assert first[0] == second[0] == third[0]
    assert [each[1] for each in (first, second, third)] == [False, True, False]


def test_an_attempt_that_is_not_open_takes_nobody_in() -> None:
    def work() -> None:
        run = here(20)
        if rank() == 1:
            here(1.0)
        wait_for_all(run)

    _, error = run_ranks(2, work, may_fail=True)
    assert error.kind == "StageLostError"


def test_an_interruptible_call_returns_and_raises() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert interruptible(lambda: 3) == 3
    with pytest.raises(KeyError):
        interruptible(fail)
    with pytest.raises(KeyError):
        interruptible(lambda: time.sleep(1), fail)


#: A store whose host has stopped; a module-level object that takes its time while Python ends, as large models do.
_ENDS_WHILE_THE_STORE_IS_ASKED = """
import os, signal, sys, time
from datetime import timedelta
from lightning_sg._compat import TCPStore
from lightning_sg.transport import RunStore, interruptible
from lightning_sg.transport.news import News

port, how = int(sys.argv[1]), sys.argv[2]
told, tell = os.pipe()
host = os.fork()
if not host:
    store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=10), wait_for_workers=False)
    os.write(tell, b"x")
    time.sleep(60)
    os._exit(0)
os.read(told, 1)
store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=10), wait_for_workers=False)
run = RunStore(store, "attempt", 1, 2, store)
os.kill(host, signal.SIGSTOP)

class SlowToGo:
    def __del__(self, kill=os.kill, wait=os.waitpid, sleep=time.sleep, host=host, number=signal.SIGKILL):
        kill(host, number)
        wait(host, 0)
        sleep(0.5)

slow = SlowToGo()

def give_up():
    raise ValueError("it failed")

if how == "news":
    with News(run):
        time.sleep(0.3)
elif how == "last words":
    run.fail("it failed")
    time.sleep(0.1)
    run.fail("again")
else:
    interruptible(run.answers, give_up, run.hang_up)
give_up()
"""


@pytest.mark.parametrize("how", ["news", "last words", "a call"])
def test_a_process_that_asks_a_store_ends_by_its_own_error(how: str) -> None:
    command = [sys.executable, "-c", _ENDS_WHILE_THE_STORE_IS_ASKED, str(free_port()), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "ValueError: it failed" in ended.stderr
    assert ended.returncode == 1, ended.stderr[-1000:]


def test_hanging_up_ends_what_waits_for_an_answer_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as asked, socket.create_server(("127.0.0.1", 0)) as other:
        waiting, kept = (socket.create_connection(server.getsockname()) for server in (asked, other))
        theirs, kept_there = asked.accept()[0], other.accept()[0]
        hang_up(asked.getsockname())
        assert waiting.recv(1) == b""
        kept_there.sendall(b"x")
        assert kept.recv(1) == b"x"
        for each in (waiting, kept, theirs, kept_there):
            each.close()


def test_a_store_in_a_file_has_no_place(tmp_path: Path) -> None:
    assert place_of(PrefixStore("inner", FileStore(str(tmp_path / "store"), 1))) is None
