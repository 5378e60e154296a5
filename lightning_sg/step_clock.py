"""Measures what a process does with the time of its training steps: it computes, predicts, sends and waits."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from lightning_sg.lightning_api import Profiler, pl
from lightning_sg.profiling import kind_of

#: The most steps that are kept: the last ones say what the speed has come to.
KEPT = 200
#: Steps at the start that say little about the rest: predictors are built, memory is taken.
_FIRST = 3


@dataclass(frozen=True)
class Shares:
    """How the time of a process divides; the four add up to 1.

    Attributes:
        compute: Forward and backward pass, optimizer, exact gradients.
        predictor: Predicting, and teaching the predictor.
        waiting: Waiting for other processes, and sending to them.
        other: Loading data, logging, Lightning's own work.
    """

    compute: float = 0.0
    predictor: float = 0.0
    waiting: float = 0.0
    other: float = 0.0


@dataclass
class Spent:
    """The time of some training steps.

    Attributes:
        steps: How many.
        whole: Seconds from the end of the step before to their own end, loading their batches included.
        batch: Seconds of that in which batches were worked on.
        kinds: Seconds of that for each kind of work that has a name.
    """

    steps: int = 0
    whole: float = 0.0
    batch: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)

    def add(self, whole: float, batch: float, kinds: Mapping[str, float]) -> None:
        """Adds one step."""
        self.steps += 1
        self.whole += whole
        self.batch += batch
        for kind, seconds in kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0.0) + seconds

    @property
    def shares(self) -> Shares | None:
        """How it divides; ``None`` if there was no step."""
        if not self.whole:
            return None
        predictor = self.kinds.get("predictor", 0.0) / self.whole
        waiting = (self.kinds.get("wait", 0.0) + self.kinds.get("send", 0.0)) / self.whole
        compute = max(0.0, self.batch / self.whole - predictor - waiting)
        return Shares(compute, predictor, waiting, max(0.0, 1 - compute - predictor - waiting))


@dataclass
class StepClock:
    """The clock of one trainer. It stands between this package's actions and the trainer's profiler.

    Attributes:
        profiler: The trainer's, which sees all actions as well.
        began: When training began.
        gaps: Seconds of the newest steps.
        fresh: The time of the steps since it was last asked for.
        spent: The time of all steps but the first few.
    """

    profiler: Profiler
    began: float = field(default_factory=time.perf_counter)
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    fresh: Spent = field(default_factory=Spent)
    spent: Spent = field(default_factory=Spent)
    _kinds: dict[str, float] = field(default_factory=dict)
    _inner: float = 0.0
    _batch: float | None = None
    _before: float | None = None

    def profile(self, action: str) -> AbstractContextManager[object]:
        """Shows an action to the profiler, and measures it. Of nested actions, each has its own time alone."""
        return _Action(self, action)

    def start(self, action: str) -> None:
        """Shows the profiler that an action starts; it counts as computing."""
        self.profiler.start(action)

    def stop(self, action: str) -> None:
        """Shows the profiler that an action ends."""
        self.profiler.stop(action)

    def begin(self) -> None:
        """Training begins."""
        self.began = time.perf_counter()
        self.gaps.clear()
        self.fresh, self.spent = Spent(), Spent()
        self.pause()

    def open(self) -> None:
        """Work on a batch begins."""
        self._batch = time.perf_counter()

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._before is not None and self._batch is not None:
            whole = now - self._before
            self.gaps.append(whole)
            self.fresh.add(whole, now - self._batch, self._kinds)
            if len(self.gaps) > _FIRST:
                self.spent.add(whole, now - self._batch, self._kinds)
        self._before, self._batch, self._kinds = now, None, {}

    def pause(self) -> None:
        """Something other than training comes next: the time until the next step does not count."""
        self._before, self._kinds = None, {}

    @property
    def seconds(self) -> float:
        """Seconds since training began, with everything that happened."""
        return time.perf_counter() - self.began

    @property
    def milliseconds(self) -> float | None:
        """The median time of the newest steps; ``None`` if there are none."""
        return 1000 * statistics.median(self.gaps) if self.gaps else None

    def take(self) -> Spent:
        """The time of the steps since this was last asked."""
        fresh, self.fresh = self.fresh, Spent()
        return fresh


class _Action:
    """One action in a step. It is no generator, because a step has two at every boundary."""

    def __init__(self, clock: StepClock, name: str) -> None:
        self._clock = clock
        self._name = name
        self._begun = self._outside = 0.0

    def __enter__(self) -> None:
        clock = self._clock
        self._outside, clock._inner = clock._inner, 0.0
        self._begun = time.perf_counter()
        clock.profiler.start(self._name)

    def __exit__(self, *_failure: object) -> None:
        clock, kind = self._clock, kind_of(self._name)
        try:
            clock.profiler.stop(self._name)
        finally:
            spent = time.perf_counter() - self._begun
            clock._kinds[kind] = clock._kinds.get(kind, 0.0) + spent - clock._inner
            clock._inner = self._outside + spent


_clocks: WeakKeyDictionary[Any, StepClock] = WeakKeyDictionary()


def clock_of(trainer: pl.Trainer) -> StepClock:
    """The clock of a trainer: the same one each time, in front of the profiler that the trainer has now."""
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    clock = _clocks.get(trainer)
    if clock is None:
        clock = _clocks[trainer] = StepClock(profiler)
    clock.profiler = profiler
    return clock


__all__ = ["KEPT", "Shares", "Spent", "StepClock", "clock_of"]
