"""``python -m benchmarks.faults.serve``: forks the ranks of one training after another; see ``warm.py``."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict_saver  # what the ranks would import

from benchmarks.faults.job import Job
from benchmarks.faults.runner import Runner
from benchmarks.faults.system import adopt_orphans, die_with_parent, kill_tree

#: Seconds after which a training is given up, whatever it does.
LIMIT = 240.0


class Becomes(BaseException):
    """This process is a new rank: unwinds to the top of the program, which does the work there.

    Args:
        work: What the rank does.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self.work = work


def serve() -> Callable[[], None] | None:
    """Forks a runner for each training that is asked for; returns only in a rank, with what that is to do."""
    try:
        for line in sys.stdin:
            _run_one(Path(line.strip()))
            print("done", flush=True)
    except Becomes as role:
        return role.work
    return None


def _run_one(folder: Path) -> None:
    runner = os.fork()
    if not runner:
        _be_runner(folder)
    ready, _, _ = select.select([descriptor := os.pidfd_open(runner)], [], [], LIMIT)
    os.close(descriptor)
    if not ready:
        (folder / "runner.log").open("a").write(f"\nThe training did not end within {LIMIT:g} s.\n")
        kill_tree(runner)
    os.waitpid(runner, 0)


def _be_runner(folder: Path) -> None:
    die_with_parent()
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    log = os.open(folder / "runner.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        job: Job = pickle.loads((folder / "job.pickle").read_bytes())
        outcome = Runner(job, _fork_rank).run()
        (folder / "outcome.pickle").write_bytes(pickle.dumps(outcome))
    except Becomes:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(0)


def _fork_rank(prepare: Callable[[], None], work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    die_with_parent()
    prepare()
    raise Becomes(work)


def main() -> None:
    """Serves, or is a rank."""
    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    work = serve()
    if work is not None:
        work()


if __name__ == "__main__":
    main()
