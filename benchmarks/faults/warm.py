"""A process that has imported everything and forks the ranks, so that a training starts in a tenth of a second.

The ranks return to the top of that process's program and end as a user's script does: with an exit code, exit handlers
and the end of the interpreter.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.job import Job
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.system import kill_tree

ROOT = Path(__file__).parents[2]


class NoOutcomeError(RuntimeError):
    """The runner of a training failed."""


class Warm:
    """The process, from the side of those who want trainings run, one at a time.

    Args:
        process: It.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, job: Job) -> Outcome:
        """Runs a training, and clears up after it.

        Raises:
            NoOutcomeError: If the instrument itself failed; the message has its output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        (job.folder / "job.pickle").write_bytes(pickle.dumps(job))
        self._process.stdin.write(f"{job.folder}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n":
            raise NoOutcomeError("the process that forks the ranks has ended")
        found = job.folder / "outcome.pickle"
        if not found.exists():
            raise NoOutcomeError((job.folder / "runner.log").read_text()[-2000:])
        outcome: Outcome = pickle.loads(found.read_bytes())
        return outcome


@contextmanager
def warmed() -> Iterator[Warm]:
    """While entered, such a process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.faults.serve"],
        cwd=ROOT,
        env={**clean_environment(), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Warm(process)
    finally:
        kill_tree(process.pid)
        process.communicate()


def run_job(job: Job) -> Outcome:
    """Runs one training in a process of its own."""
    with warmed() as warm:
        return warm.run(job)


def clean_environment() -> dict[str, str]:
    """This process's environment without what launchers set."""
    launched = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}


__all__ = ["NoOutcomeError", "Warm", "run_job", "warmed"]
