"""Draws the rounds of the campaign: each follows from the seed and its number alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from benchmarks.faults.fault import (
    CONNECTING,
    END,
    GATHERING,
    START,
    Action,
    Fault,
    exit_with,
    filling,
    hanging,
    interrupting_all,
    leaving,
    raising,
    unplugging,
)
from benchmarks.faults.job import BATCHES, SAVED_EVERY, STEPS, Job, Odd
from benchmarks.faults.tampering import EXECUTED, flip, plant, truncate
from benchmarks.faults.verdict import Ends, Expectation, Fails, Launched, Names, Refuses, Survives

#: Spoils the checkpoint that a training starts from.
Spoil = Callable[[Path, random.Random], None]

_SET_UP = (
    START,
    CONNECTING,
    "setup",
    "configure_model",
    "configure_optimizers",
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
)
_STEPS = ("on_train_batch_start", "training_step", "on_before_optimizer_step", "on_train_batch_end")
_VALIDATION = ("on_validation_start", "validation_step", "on_validation_epoch_end")
_EPOCHS = ("on_train_epoch_end", *_VALIDATION)
#: Where an exception of the module in a process without the loss is a warning, and the run goes on.
_MAY_END_EARLY = ("on_train_batch_end", "on_train_epoch_end", "on_validation_epoch_end")
_LAST = ("on_train_end", "on_fit_end", "teardown", END)
_DISK = 1 << 20  # bytes; a training writes a quarter of that


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: Its number.
        kind: Of the fault.
        job: The training; its folder is the round's.
        expectation: What follows from the fault.
        spoil: What is done to the checkpoint that it starts from.
        resumes: Whether it starts from a checkpoint.
        root: Whether it needs root.
    """

    number: int
    kind: str
    job: Job
    expectation: Expectation
    spoil: Spoil | None = None
    resumes: bool = False
    root: bool = False

    def __str__(self) -> str:
        job, odd = self.job, self.job.odd
        parts = [f"{job.processes} processes", job.launcher, job.checkpoint]
        parts += ["2 replicas"] if job.replicas > 1 else []
        parts += [str(job.fault)] if job.fault is not None else []
        parts += [_described(odd)] if odd != Odd() else []
        return f"{self.kind}: {', '.join(parts)}"


def _described(odd: Odd) -> str:
    """What is odd, without what is not."""
    plain = Odd(odd.rank)
    names = [each.name for each in fields(Odd) if getattr(odd, each.name) != getattr(plain, each.name)]
    return f"rank {odd.rank} with {', '.join(f'{name}={getattr(odd, name)}' for name in names)}"


@dataclass(frozen=True)
class Draw:
    """What a kind draws from.

    Attributes:
        random: The numbers.
        job: The training without a fault.
        rank: The rank that is struck.
    """

    random: random.Random
    job: Job
    rank: int

    def fault(self, action: Action | int, seconds: float | None = None, *, early: bool = False) -> tuple[Job, Fault]:
        """An action at some moment.

        Args:
            action: What happens.
            seconds: How long it lasts.
            early: Only moments after which much is still to be done.
        """
        fault, job = self._moment(early=early)
        fault = fault.by(action, seconds)
        return replace(job, fault=fault), fault

    def _moment(self, *, early: bool) -> tuple[Fault, Job]:
        draw, job = self.random, self.job
        if job.launcher == "spawn":
            return Fault.at(self.rank, draw.randrange(STEPS - 2), "on_train_batch_start"), job
        sort = draw.choices(("set-up", "step", "epoch", "saving", "last", "after", "loading"), (5, 6, 3, 3, 2, 1, 1))[0]
        if sort == "set-up":
            return Fault.at(self.rank, hook=draw.choice(_SET_UP)), job
        if sort == "step" or early:
            return Fault.at(self.rank, draw.randrange(1, STEPS - 2), draw.choice(_STEPS)), job
        if sort == "epoch":
            return Fault.at(self.rank, draw.choice((BATCHES, STEPS)), draw.choice(_EPOCHS)), job
        if sort == "saving":
            step = SAVED_EVERY * draw.choice((1, 2))
            if job.checkpoint == "whole" and draw.random() < 0.5:
                return Fault.at(self.rank, hook=GATHERING), job
            return Fault.at(self.rank, step, "on_save_checkpoint").after(draw.choice((0.0, draw.uniform(0, 0.05)))), job
        if sort == "last":
            return Fault.at(self.rank, hook=draw.choice(_LAST)), job
        if sort == "loading":
            return Fault.at(self.rank, hook="on_load_checkpoint"), replace(job, resume=Path())
        stage = draw.choice(("test", "predict"))
        return Fault.at(self.rank, hook=f"{stage}_step"), replace(job, afterwards=stage)


def draw_round(seed: int, number: int, folder: Path, kinds: list[str]) -> Round:
    """The round of that number.

    Args:
        seed: Of the campaign.
        number: Of the round.
        folder: For its files.
        kinds: The kinds to choose from.
    """
    draw = random.Random(f"{seed}-{number}")
    kind = draw.choice(kinds)
    processes = draw.choices((2, 3, 4), (5, 3, 2))[0]
    launcher = draw.choices(("environment", "popen", "spawn"), (90, 7, 3))[0]
    if kind in _FORKED:
        launcher = "environment"
    if launcher != "environment":
        processes = 2  # each starts Python anew
    job = Job(
        folder,
        processes,
        replicas=draw.choice((1, 2)) if processes == 4 else 1,
        launcher=launcher,
        checkpoint=draw.choice(("whole", "sharded")),
        # Processes that start Python anew may meet many seconds apart.
        timeout=2 + processes / 2 if launcher == "environment" else 20.0,
    )
    made = KINDS[kind](number, Draw(draw, job, draw.randrange(processes)))
    if launcher == "spawn" and isinstance(made.expectation, Names):
        return replace(made, expectation=Launched(made.expectation.rank))
    return made


def _gone(kind: str, action: Callable[[random.Random], Action | int]) -> Callable[[int, Draw], Round]:
    """A kind after which the rank is gone, or as good as gone."""

    def make(number: int, draw: Draw) -> Round:
        what = action(draw.random)
        job, fault = draw.fault(what)
        if fault.delay and not _works_from_a_thread(what):
            fault = replace(fault, delay=0.0)
            job = replace(job, fault=fault)
        return Round(number, kind, job, Names(draw.rank, may_end=_may_end(fault)), resumes=job.resume is not None)

    return make


def _works_from_a_thread(action: Action | int) -> bool:
    return action in (signal.SIGKILL, signal.SIGSTOP) or getattr(action, "at_once", False)


def _may_end(fault: Fault) -> bool:
    """Whether the others may already have all that they need."""
    return fault.is_ending or fault.delay > 0 or fault.hook in ("test_step", "predict_step")


def _exception(number: int, draw: Draw) -> Round:
    reason = f"odd {draw.random.randrange(1000, 10000)}"
    job, fault = draw.fault(raising(draw.random.choice((ValueError, KeyError, AssertionError))(reason)))
    fault = replace(fault, delay=0.0)
    last = draw.rank % job.stages == 0
    early = fault.hook in _MAY_END_EARLY and not last and job.launcher != "spawn"
    expected: Expectation = Survives() if early else Names(draw.rank, reason, _may_end(fault))
    return Round(number, "exception", replace(job, fault=fault), expected, resumes=job.resume is not None)


def _told(kind: str, number_: int) -> Callable[[int, Draw], Round]:
    """A signal to one rank, which Lightning answers at the end of the batch."""

    def make(number: int, draw: Draw) -> Round:
        job, _fault = draw.fault(number_, early=True)
        return Round(number, kind, job, Names(draw.rank))

    return make


def _interrupt(number: int, draw: Draw) -> Round:
    job, _fault = draw.fault(interrupting_all, early=True)
    return Round(number, "SIGINT to all", job, Ends())


def _short_stop(number: int, draw: Draw) -> Round:
    job, _fault = draw.fault(signal.SIGSTOP, draw.random.uniform(0.3, 1.2))
    return Round(number, "SIGSTOP, short", job, Survives(), resumes=job.resume is not None)


def _long_stop(number: int, draw: Draw) -> Round:
    seconds = draw.random.choice((None, 2.5 * draw.job.timeout))
    job, fault = draw.fault(signal.SIGSTOP, seconds)
    return Round(
        number, "SIGSTOP, long", job, Names(draw.rank, may_end=_may_end(fault)), resumes=job.resume is not None
    )


def _nan(number: int, draw: Draw) -> Round:
    where = draw.random.choice(("data", "loss", "activations") if draw.job.stages > 1 else ("data", "loss"))
    words = {"data": r"\b(data|input)", "loss": r"\bloss\b", "activations": r"activation"}[where]
    # Of the stages before the last; rank 0 is the last.
    rank = draw.random.randrange(1, draw.job.stages)
    odd = Odd(rank, nan=where, step=draw.random.randrange(1, STEPS - 3))
    patterns = (r"\b(stage|rank) \d", r"\bbatch \d", r"(?i)\bnan\b|finite", words)
    return Round(number, "NaN", replace(draw.job, odd=odd), Refuses(patterns))


def _odd_data(number: int, draw: Draw) -> Round:
    if draw.random.random() < 0.5:
        odd, reason = Odd(draw.rank, seed=5), "batch"
    else:
        odd, reason = (
            Odd(draw.rank, batches=BATCHES - 2),
            r"length|fewer|more batches|longer|shorter|number of batches|gives \d+ batches",
        )
    return Round(number, "odd data", replace(draw.job, odd=odd), Names(draw.rank, reason))


def _settings(number: int, draw: Draw) -> Round:
    odd, word = draw.random.choice(
        (
            (Odd(draw.rank, delay=3), "delay"),
            (Odd(draw.rank, predictor="zero"), "predictor"),
            (Odd(draw.rank, wire="bf16"), "wire"),
            (Odd(draw.rank, width=24), r"shape|parameter|net\.\d"),
        )
    )
    return Round(number, "settings", replace(draw.job, odd=odd), Refuses((rf"\brank {draw.rank}\b", word)))


def _checkpoint(kind: str, spoil: Spoil, *, may_be_harmless: bool = False) -> Callable[[int, Draw], Round]:
    # That a planted checkpoint is refused is what matters; torch's own words for it do not name the file.
    words = r"\.ckpt|Weights only load failed" if spoil is _plant else r"\.ckpt"

    def make(number: int, draw: Draw) -> Round:
        refuses = Refuses((words,), may_be_harmless)
        return Round(number, kind, replace(draw.job, resume=Path()), refuses, spoil, resumes=True)

    return make


def _plant(checkpoint: Path, draw: random.Random) -> None:
    plant(checkpoint, draw, checkpoint.parents[1] / EXECUTED)


def _full_disk(number: int, draw: Draw) -> Round:
    job = replace(draw.job, disk=_DISK)
    fault = Fault.at(draw.rank, SAVED_EVERY + 1, "on_train_batch_end")
    fault = fault.by(filling(job.checkpoints, draw.random.randrange(3) * 4096))
    return Round(number, "full disk", replace(job, fault=fault), Fails("No space left"), root=True)


def _short_outage(number: int, draw: Draw) -> Round:
    fault = Fault.at(draw.rank, draw.random.randrange(1, STEPS - 2)).by(unplugging(draw.random.uniform(0.2, 1.0)))
    return Round(number, "link down, short", replace(draw.job, fault=fault, network=True), Survives(), root=True)


def _outage(number: int, draw: Draw) -> Round:
    fault = Fault.at(draw.rank, draw.random.randrange(1, STEPS - 2)).by(unplugging())
    job = replace(draw.job, fault=fault, network=True)
    return Round(number, "link down", job, Names(draw.rank), root=True)


#: How each kind makes a round from what was drawn.
KINDS: dict[str, Callable[[int, Draw], Round]] = {
    "SIGKILL": _gone("SIGKILL", lambda draw: signal.SIGKILL),
    "SIGSTOP, short": _short_stop,
    "SIGSTOP, long": _long_stop,
    "SIGTERM": _told("SIGTERM", signal.SIGTERM),
    "SIGINT": _told("SIGINT", signal.SIGINT),
    "SIGINT to all": _interrupt,
    "exception": _exception,
    "sys.exit": _gone("sys.exit", lambda draw: leaving(draw.randrange(4))),
    "os._exit": _gone("os._exit", lambda draw: exit_with(draw.randrange(4))),
    "hang": _gone("hang", lambda draw: hanging),
    "NaN": _nan,
    "odd data": _odd_data,
    "settings": _settings,
    "checkpoint, truncated": _checkpoint("checkpoint, truncated", truncate),
    "checkpoint, bit flipped": _checkpoint("checkpoint, bit flipped", flip, may_be_harmless=True),
    "checkpoint, planted": _checkpoint("checkpoint, planted", _plant),
    "full disk": _full_disk,
    "link down, short": _short_outage,
    "link down": _outage,
}
#: Kinds that need the ranks to be this program's own children, or that would take too long otherwise.
_FORKED = (
    "hang",
    "SIGSTOP, short",
    "SIGSTOP, long",
    "NaN",
    "odd data",
    "settings",
    "checkpoint, truncated",
    "checkpoint, bit flipped",
    "checkpoint, planted",
    "full disk",
    "link down, short",
    "link down",
)
#: Kinds that need root.
PRIVILEGED = ("full disk", "link down, short", "link down")

__all__ = ["KINDS", "PRIVILEGED", "Round", "draw_round"]
