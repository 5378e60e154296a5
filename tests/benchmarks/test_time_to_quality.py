"""Time to quality: when a curve reaches its target, and the table of it."""

from __future__ import annotations

from typing import Any

from benchmarks import time_to_quality
from benchmarks.runs import Run
from benchmarks.tasks import BACKPROPAGATION, TASKS, WHOLE
from tests.benchmarks.records import DEFAULT, line, record_of


def timed(run: Run, curve: list[tuple[int, float, float | None]]) -> dict[str, Any]:
    return record_of(run, curve[-1][2], curve=curve, steps=curve[-1][0], seconds=curve[-1][1])


def test_time_to_quality():
    metric = TASKS["char-800"].metric
    record = timed(Run("char-800", WHOLE, BACKPROPAGATION, 0, 1e-3), [(1, 1.0, 3.0), (2, 2.0, None), (3, 3.0, 2.0)])
    assert time_to_quality.time_to(record, 3.5, metric) == 1.0
    assert time_to_quality.time_to(record, 2.5, metric) == 3.0
    assert time_to_quality.time_to(record, 1.9, metric) is None


def test_time_table():
    def pair(seed: int, ends: float) -> list[dict[str, Any]]:
        plain = Run("char-800", WHOLE, BACKPROPAGATION, seed, 1e-3, points=2)
        cut = Run("char-800", "2 stages", DEFAULT, seed, 1e-3, points=2, devices=2)
        return [
            timed(plain, [(50, 5.0, 3.0), (100, 10.0, 2.0)]),
            timed(cut, [(50, 3.0, 2.5), (100, 6.0, ends)]),
        ]

    row = line(time_to_quality.table(pair(0, 1.9)), DEFAULT)
    assert row[1:] == ["1.9000", "6.0", "0.60", "60.0", "0.60", "1 of 1"]
    assert line(time_to_quality.table(pair(0, 1.9)), BACKPROPAGATION)[2:4] == ["10.0", "1.00"]
    assert time_to_quality.table(pair(0, 1.9)[1:]) == ""  # nothing to compare with
    assert line(time_to_quality.table(pair(0, 2.1)), DEFAULT)[2:4] == ["not reached", "-"]
    both = line(time_to_quality.table([*pair(0, 1.9), *pair(1, 2.1)]), DEFAULT)
    assert both[2:4] == ["6.0", "-"]
    assert both[-1] == "1 of 2"
