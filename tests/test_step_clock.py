"""The clock of training steps: kinds of work are told apart, and what is no training does not count."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

from lightning_sg import SyntheticGradients, profiling
from lightning_sg.step_clock import Spent, StepClock, clock_of
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks


class Now:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now()
    monkeypatch.setattr(time, "perf_counter", now)
    return now


def step(clock: StepClock, now: Now) -> None:
    """A second of loading, then a batch of nine: four of waiting, one of predicting with one of sending inside."""
    now.seconds += 1
    clock.open()
    with clock.profile(profiling.WAIT_ACTIVATIONS):
        now.seconds += 4
    with clock.profile(profiling.PREDICT):
        now.seconds += 0.5
        with clock.profile(profiling.SEND):
            now.seconds += 1
        now.seconds += 0.5
    now.seconds += 3
    clock.tick()


def test_kinds_of_work_are_told_apart(now: Now) -> None:
    clock = StepClock(PassThroughProfiler())
    for _ in range(3):
        step(clock, now)
    spent = clock.take()
    assert spent.steps == 2  # the first one has no step before it to count from
    assert spent.whole == pytest.approx(20)
    assert clock.milliseconds == pytest.approx(10_000)
    shares = spent.shares
    assert shares is not None
    assert (shares.compute, shares.predictor, shares.waiting, shares.other) == pytest.approx((0.3, 0.1, 0.5, 0.1))
    assert clock.take() == Spent()


def test_what_is_no_training_does_not_count(now: Now) -> None:
    clock = StepClock(PassThroughProfiler())
    clock.begin()
    step(clock, now)
    clock.pause()
    now.seconds += 1000
    step(clock, now)
    step(clock, now)
    assert clock.milliseconds == pytest.approx(10_000)
    assert clock.seconds == pytest.approx(1030)


def test_the_profiler_sees_what_is_measured() -> None:
    profiler = SimpleProfiler()
    clock = StepClock(profiler)
    with pytest.raises(KeyError), clock.profile(profiling.LEARN):
        raise KeyError
    assert list(profiler.recorded_durations) == [profiling.LEARN]


def test_a_trainer_keeps_its_clock_but_not_its_profiler() -> None:
    trainer = make_trainer()
    clock = clock_of(trainer)
    trainer.profiler = SimpleProfiler()
    assert clock_of(trainer) is clock
    assert clock.profiler is trainer.profiler


def train(folder: Path, **arguments: Any) -> tuple[list[dict[str, str]], set[str]]:
    """The rows of a CSVLogger that have times, and the names that the trainer has metrics of."""
    trainer = make_trainer(
        logger=CSVLogger(folder, name="run", version=0),
        callbacks=[SyntheticGradients()],
        log_every_n_steps=1,
        **arguments,
    )
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    if not trainer.is_global_zero:
        return [], set()
    with (folder / "run" / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["sg/seconds"]], set(trainer.callback_metrics)


@pytest.mark.parametrize("processes", [1, 2])
def test_times_go_to_the_loggers_alone(processes: int, tmp_path: Path) -> None:
    if processes == 1:
        rows, metrics = train(tmp_path)
    else:
        rows, metrics = run_ranks(2, lambda: train(tmp_path, devices=2, strategy="synthetic_gradients"))[0]
    assert {int(row["step"]) for row in rows} <= set(range(10))
    assert len(rows) >= 8
    seconds = [float(row["sg/seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert all(float(row["sg/step_ms"]) > 0 for row in rows)
    waiting = [float(row["sg/waiting"]) for row in rows if row.get("sg/waiting")]
    assert bool(waiting) == (processes > 1)  # nothing waits in one process
    assert all(0 < share < 1 for share in waiting)
    assert not {"sg/seconds", "sg/step_ms", "sg/waiting"} & metrics
    assert not [name for name in (*metrics, *rows[0]) if "time." in name]
