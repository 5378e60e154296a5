"""Runs one training in real processes, disturbs it from outside where the fault asks for that, and sees it end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.channel import DEVICE, Channel, address
from benchmarks.faults.fault import interrupting_all
from benchmarks.faults.job import Job
from benchmarks.faults.outcome import Ending, Outcome, problems_of
from benchmarks.faults.system import descendants, die_with_parent, free_port, is_alive, mount_disk, send, set_device
from benchmarks.faults.tampering import EXECUTED

#: Forks a process that is prepared and then does the work at the top of its program.
Fork = Callable[[Callable[[], None], Callable[[], None]], int]

_START = 60.0  #: seconds until the fault strikes, or an undisturbed training ends
_ANEW = 60.0  #: seconds more where processes start Python anew
_GRACE = 3.0  #: seconds between SIGTERM and SIGKILL, and for processes that are still ending
_LOOK = 0.02  #: seconds between two looks
_LOGGED = 3000  #: characters of a rank's output that are kept


class Runner:
    """One training.

    Args:
        job: The training.
        fork: See :data:`Fork`.
    """

    def __init__(self, job: Job, fork: Fork) -> None:
        self._job = job
        self._fork = fork
        self._network: Channel | None = None
        self._main: dict[int, int] = {}  # the processes that this one has started, by rank
        self._codes: dict[int, int] = {}  # by process
        self._ended: dict[int, float] = {}  # by process
        self._struck_at: float | None = None
        self._killed: set[int] = set()
        self._deaf: set[int] = set()

    @property
    def limit(self) -> float:
        """Seconds from the fault until the others must have ended: three timeouts, and the machine's slowness."""
        fault = self._job.fault
        # After a pause the whole training is still to come.
        longest = 30.0 + (fault.action.seconds or 0.0) if fault is not None and fault.is_pause else 0.0
        return 3 * self._job.timeout + 15.0 + longest

    def run(self) -> Outcome:
        """See above."""
        began = time.time()
        if self._job.disk:
            mount_disk(self._job.checkpoints, self._job.disk)
        with self._networked():
            ours = set(descendants(os.getpid()))
            self._start()
            self._watch()
            took = time.time() - began
            left = self._clear(ours)
        endings = {rank: self._ending(rank) for rank in range(self._job.processes)}
        saved = sorted(path.name for path in self._job.checkpoints.glob("*.ckpt"))
        struck = self._job.struck.exists()
        executed = (self._job.folder / EXECUTED).exists()
        return Outcome(endings, struck, took, left, problems_of(self._job.checkpoints), saved, executed)

    @contextmanager
    def _networked(self) -> Iterator[None]:
        """While entered, each rank has a network if the job asks for that."""
        if not self._job.network:
            yield
            return
        network, runner = Channel(self._job.processes, None, 0.0), os.getpid()
        self._network = network.__enter__()
        try:
            yield
        finally:
            if os.getpid() == runner:  # the ranks come here too, on their way to the top of the program
                network.__exit__(None, None, None)

    # ------------------------------------------------------------------ start

    def _start(self) -> None:
        port = str(free_port())
        if self._job.launcher == "environment":
            for rank in range(self._job.processes):
                self._main[rank] = self._fork(lambda rank=rank: self._prepare(rank, port), self._job.run)  # type: ignore[misc]
            return
        with self._log(0).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.faults.train", str(self._job.folder / "job.pickle")],
                env={**os.environ, "MASTER_PORT": port},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        self._main[0] = process.pid

    def _prepare(self, rank: int, port: str) -> None:
        """In the new process of a rank."""
        log = os.open(self._log(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if self._network is not None:
            self._network.enter_as(rank)
            where |= {"MASTER_ADDR": address(0), "GLOO_SOCKET_IFNAME": DEVICE}
        count = str(self._job.processes)
        os.environ.update(
            where,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=count,
            LOCAL_WORLD_SIZE=count,
            TORCHELASTIC_RUN_ID="faults",
        )

    def _log(self, rank: int) -> Path:
        return self._job.folder / f"rank-{rank}.log"

    # ------------------------------------------------------------------ watch

    def _watch(self) -> None:
        began = time.time()
        undone: list[tuple[float, Callable[[], None]]] = []  # what is to be done, and when
        while not self._over():
            self._reap()
            now = time.time()
            if self._struck_at is None and self._job.struck.exists():
                self._struck_at = self._job.struck.stat().st_mtime
                undone += self._disturb(self._struck_at)
            for due in [each for each in undone if each[0] <= now]:
                undone.remove(due)
                due[1]()
            start = _START if self._job.launcher == "environment" else _START + _ANEW
            since, limit = (began, start) if self._struck_at is None else (self._struck_at, self.limit)
            if now - since > limit:
                self._end_those_that_hang()
                return
            time.sleep(_LOOK)
        for _when, repair in undone:
            repair()

    def _over(self) -> bool:
        """Whether all have ended, but for a rank that the fault itself keeps from ending."""
        running = {rank for rank, pid in self._ranks().items() if pid not in self._ended}
        fault = self._job.fault
        if fault is not None and self._struck_at is not None and fault.keeps and running <= {fault.rank}:
            return len(self._ranks()) == self._job.processes
        return not running and all(pid in self._ended for pid in self._main.values())

    def _ranks(self) -> dict[int, int]:
        """The processes of the ranks that are known."""
        noted = {}
        for rank in range(self._job.processes):
            path = self._job.folder / f"pid-{rank}"
            if path.exists() and (text := path.read_text()):
                noted[rank] = int(text)
        return {**noted, **self._main}

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            self._codes[pid] = os.waitstatus_to_exitcode(status)
            self._ended[pid] = time.time()
        for rank, pid in self._ranks().items():
            # A child of this process has ended when it can be waited for: until then, a thread of it may be at work.
            if self._main.get(rank) != pid and not is_alive(pid):
                self._ended.setdefault(pid, time.time())

    def _disturb(self, struck: float) -> list[tuple[float, Callable[[], None]]]:
        """Does what the fault asks of others than its rank; returns what is to be done later."""
        fault = self._job.fault
        assert fault is not None
        action, pid = fault.action, self._ranks()[fault.rank]
        if action == interrupting_all:
            for each in self._ranks().values():
                send(each, signal.SIGINT)
        if action.name == "link down":
            self._in_network(fault.rank, up=False)
        if action.seconds is None:
            return []
        if action.name == "link down":
            return [(struck + action.seconds, lambda: self._in_network(fault.rank, up=True))]
        return [(struck + action.seconds, lambda: send(pid, signal.SIGCONT))]

    def _in_network(self, rank: int, *, up: bool) -> None:
        network = self._network
        assert network is not None
        child = os.fork()
        if not child:
            try:
                network.enter_as(rank)
                set_device(up, DEVICE)
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    # ------------------------------------------------------------------ end

    def _end_those_that_hang(self) -> None:
        fault = self._job.fault
        hanging = {rank: pid for rank, pid in self._ranks().items() if is_alive(pid)}
        if fault is not None and fault.keeps and self._struck_at is not None:
            hanging.pop(fault.rank, None)
        self._killed = set(hanging)
        for pid in hanging.values():
            send(pid, signal.SIGTERM)
        deadline = time.time() + _GRACE
        while time.time() < deadline and any(map(is_alive, hanging.values())):
            self._reap()
            time.sleep(_LOOK)
        self._deaf = {rank for rank, pid in hanging.items() if is_alive(pid)}

    def _clear(self, ours: set[int]) -> int:
        """Ends what is left, and counts what nobody knew of."""
        known = set(self._ranks().values())
        for pid in known:
            if is_alive(pid):
                send(pid, signal.SIGKILL)
        # A process that Lightning has started may still be importing; it gives up when it finds nobody.
        late = 0.0 if self._job.launcher == "environment" else 20.0
        deadline = time.time() + _GRACE + late
        while ((left := self._left(ours)) or set(self._main.values()) - set(self._ended)) and time.time() < deadline:
            self._reap()
            time.sleep(_LOOK)
        for pid in left:
            send(pid, signal.SIGKILL)
        self._reap()
        return len(left - known)

    def _left(self, ours: set[int]) -> set[int]:
        return {pid for pid in descendants(os.getpid()) if pid not in ours and is_alive(pid)}

    def _ending(self, rank: int) -> Ending:
        pid = self._ranks().get(rank)
        noted = self._job.folder / f"rank-{rank}.json"
        found = json.loads(noted.read_text()) if noted.exists() else {}
        log = self._log(rank).read_text(errors="replace")[-_LOGGED:] if self._log(rank).exists() else ""
        ended = self._ended.get(pid, time.time()) if pid is not None else time.time()
        return Ending(
            rank,
            None if pid is None else self._codes.get(pid),
            found.get("error", ""),
            found.get("digest", ""),
            round(ended - (self._struck_at or ended), 3),
            rank in self._killed,
            rank in self._deaf,
            log,
        )


__all__ = ["Fork", "Runner"]
