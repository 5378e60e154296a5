"""Unlocked stages: rarer updates get more steps, and the table compares each seed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import unlocked
from benchmarks.runs import Run
from benchmarks.tasks import BACKPROPAGATION
from tests.benchmarks.records import line, record_of


def unlocked_record(method: str, seed: int, error: float | None, steps: int, **others: Any) -> dict[str, Any]:
    budget = unlocked.STEPS[unlocked.probability(method)]
    run = Run(unlocked.TASK, unlocked.SPLIT, method, seed, 3e-3, budget=budget)
    metrics = {} if error is None else {"test_error": error, "val_error": error + 0.5}
    return record_of(run, error, metrics=metrics, steps=steps, **others)


def test_unlocked_methods_are_given_more_steps_the_rarer_updates_are():
    budgets = {run.method: run.budget for run in unlocked.plan(unlocked.COMPARED, [0])}
    assert list(budgets.values()) == pytest.approx([1, 1, 1, 5, 20])
    assert [run.seed for run in unlocked.plan(unlocked.COMPARED, [3, 4])] == [3] * 5 + [4] * 5


def test_unlocked_table_pairs_seeds_and_says_whether_the_bar_is_met():
    rare = "synthetic gradients and inputs, p = 0.2"
    records = [unlocked_record(BACKPROPAGATION, seed, 2.0 + seed, 100) for seed in (0, 1)]
    records += [unlocked_record(rare, seed, 2.9 + seed, 500) for seed in (1, 0)]
    row = line(unlocked.table(records), rare)
    assert row == [rare, "500", "100", "3.90 ± 0.71", "3.40 ± 0.71", "+0.90 ± 0.00", "+1", "yes", "2", "20"]
    worse = [*records[:2], unlocked_record(rare, 0, 3.2, 500)]
    assert line(unlocked.table(worse), rare)[5:8] == ["+1.20", "+1", "no"]
    diverged = [*records, unlocked_record(rare, 2, None, 500)]
    assert line(unlocked.table(diverged), rare)[7:9] == ["no", "3, 1 diverged"]
    assert line(unlocked.table(records), BACKPROPAGATION)[5:8] == ["-", "-", "-"]


def test_unlocked_table_leaves_out_other_numbers_of_steps():
    fewer = {**unlocked_record("synthetic gradients and inputs, p = 0.05", 0, 9.0, 100), "budget": 1.0}
    assert "9.00" not in unlocked.table([fewer])
