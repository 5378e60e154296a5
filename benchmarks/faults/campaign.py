"""Runs rounds, judges them by the same training without a fault, and keeps what they found."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from benchmarks.faults.job import Job
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.rounds import Round, draw_round
from benchmarks.faults.verdict import UNCLEAR, Verdict
from benchmarks.faults.warm import NoOutcomeError, Warm, warmed


@dataclass(frozen=True)
class Result:
    """A round that was run.

    Attributes:
        round: It.
        verdict: The judgement.
        outcome: How it ended.
    """

    round: Round
    verdict: Verdict
    outcome: Outcome

    def as_record(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "round": self.round.number,
            "kind": self.round.kind,
            "what": str(self.round),
            "verdict": self.verdict.kind,
            "why": self.verdict.why,
            "outcome": self.outcome.as_record(),
        }


class Undisturbed:
    """The same trainings without faults: their weights, and checkpoints to start from. Threads may use it together.

    Args:
        folder: For their files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[Any, str] = {}
        self._lock = Lock()

    def digest(self, warm: Warm, job: Job) -> str:
        """The checksum of the weights at the end.

        Raises:
            NoOutcomeError: If the training fails without any fault.
        """
        key = (job.processes, job.replicas, job.checkpoint, job.resume is not None)
        with self._lock:
            if key not in self._digests:
                self._digests[key] = self._run(warm, job, "-".join(map(str, key)))
            return self._digests[key]

    def checkpoint(self, warm: Warm, job: Job, to: Path) -> Path:
        """Copies the last checkpoint of half a training, with all that lies beside it, into a folder."""
        key = (job.processes, job.replicas, job.checkpoint, "half")
        folder = self._folder / "-".join(map(str, key))
        with self._lock:
            if key not in self._digests:
                half = replace(job, epochs=1, resume=None)
                self._digests[key] = self._run(warm, half, folder.name)
        shutil.copytree(folder / "checkpoints", to, symlinks=True)
        return to / "last.ckpt"

    def _run(self, warm: Warm, job: Job, name: str) -> str:
        folder = self._folder / name
        plain = Job(folder, job.processes, job.replicas, checkpoint=job.checkpoint, timeout=20.0, epochs=job.epochs)
        if job.resume is not None:
            from_ = self._folder / "-".join(map(str, (job.processes, job.replicas, job.checkpoint, "half")))
            shutil.copytree(from_ / "checkpoints", folder / "resume", symlinks=True)
            plain = replace(plain, resume=folder / "resume" / "last.ckpt")
        outcome = warm.run(plain)
        digests = {ending.digest for ending in outcome.endings.values()}
        if len(digests) != 1 or "" in digests:
            wrong = [ending.error or ending.log for ending in outcome.endings.values()]
            raise NoOutcomeError(f"The training fails without any fault ({name}): {wrong}")
        return digests.pop()


def run_round(warm: Warm, undisturbed: Undisturbed, planned: Round, seed: int) -> Result:
    """Runs a round and judges it."""
    job = planned.job
    job.folder.mkdir(parents=True)
    if planned.resumes:
        checkpoint = undisturbed.checkpoint(warm, job, job.folder / "resume")
        if planned.spoil is not None:
            planned.spoil(checkpoint, random.Random(f"{seed}-{planned.number}-spoil"))
        job = replace(job, resume=checkpoint)
    expected = undisturbed.digest(warm, job)
    outcome = warm.run(job)
    verdict = planned.expectation.judge(outcome, expected)
    if job.fault is not None and not outcome.struck and verdict.kind != "hung":
        verdict = Verdict(UNCLEAR, f"the fault did not strike: {verdict.kind} {verdict.why}")
    return Result(replace(planned, job=job), verdict, outcome)


def campaign(seed: int, numbers: list[int], kinds: list[str], jobs: int, folder: Path) -> Iterator[Result]:
    """Runs the rounds of these numbers, several at a time, and yields each when it has ended."""
    undisturbed = Undisturbed(folder / "undisturbed")
    with ExitStack() as stack:
        idle: SimpleQueue[Warm] = SimpleQueue()
        for _ in range(jobs):
            idle.put(stack.enter_context(warmed()))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))

        def one(number: int) -> Result:
            planned = draw_round(seed, number, folder / str(number), kinds)
            with _taken(idle) as warm:
                result = run_round(warm, undisturbed, planned, seed)
            shutil.rmtree(planned.job.folder)
            return result

        yield from pool.map(one, numbers)


@contextmanager
def _taken(idle: SimpleQueue[Warm]) -> Iterator[Warm]:
    warm = idle.get()
    try:
        yield warm
    finally:
        idle.put(warm)


def write(result: Result, path: Path) -> None:
    """Appends the round to a file, as a line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(result.as_record()) + "\n")


__all__ = ["Result", "Undisturbed", "campaign", "run_round", "write"]
