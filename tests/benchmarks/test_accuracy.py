"""Accuracy: the table compares each seed with backpropagation's, and says whether the bar is met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.runs import Run
from benchmarks.tasks import WHOLE, Metric
from tests.benchmarks.records import DEFAULT, ERROR, base, decoupled, line, record_of


def test_table_pairs_seeds():
    # The differences are 0.0, 0.1 and 0.2, whatever the order of the records.
    records = [base(0, 2.0), base(1, 3.0), base(2, 4.0), decoupled(2, 4.2), decoupled(0, 2.0), decoupled(1, 3.1)]
    row = line(accuracy.table(records), DEFAULT)
    assert row == [DEFAULT, "3.10 ± 1.10", "+0.10 ± 0.10", "+0.1", "yes", "0.001", "3", "10"]


def test_table_says_that_the_bar_is_not_met():
    row = line(accuracy.table([base(0, 2.0), decoupled(0, 2.11)]), DEFAULT)
    assert row[1:5] == ["2.11", "+0.11", "+0.1", "no"]


def test_table_without_backpropagation_has_no_verdict():
    assert line(accuracy.table([decoupled(0, 2.0)]), DEFAULT)[1:5] == ["2.00", "-", "+0.1", "?"]


def test_table_leaves_out_other_budgets_and_several_processes():
    wrong = [decoupled(0, 9.0, devices=2), decoupled(0, 8.0, budget=0.5)]
    text = accuracy.table([base(0, 2.0), decoupled(0, 2.0), *wrong])
    assert "9.00" not in text
    assert "### mnist-mlp-3, 0.5 × the steps" in text
    assert line(text, DEFAULT)[1:3] == ["2.00", "+0.00"]


def test_relative_bar_is_percent_of_backpropagation():
    records = [base(0, 0.200, "regression"), decoupled(0, 0.201, "regression", "3 stages")]
    assert line(accuracy.table(records), DEFAULT)[1:5] == ["0.2010", "+0.50 %", "+1 %", "yes"]


@pytest.mark.parametrize(("values", "shown"), [([None, 2.0], "1 of 2 diverged; 2.00"), ([None], "1 of 1 diverged")])
def test_diverged_runs_are_counted_and_meet_no_bar(values, shown):
    records = [record for seed, value in enumerate(values) for record in (base(seed, 2.0), decoupled(seed, value))]
    row = line(accuracy.table(records), DEFAULT)
    assert row[1] == shown
    assert row[4] == "no"


def test_diverged_backpropagation_is_no_partner():
    records = [base(0, None), base(1, 2.0), decoupled(0, 2.0), decoupled(1, 2.05)]
    assert line(accuracy.table(records), DEFAULT)[2] == "+0.05"


def test_runs_that_cannot_be_compared_are_refused():
    for others in ({"fingerprint": 7}, {"steps": 99}):
        with pytest.raises(ValueError, match="cannot be compared"):
            accuracy.table([base(0, 2.0), decoupled(0, 2.0, **others)])


def test_best_rate_is_chosen_by_validation():
    metric = replace(ERROR, key="test_error", watched="val_error")

    def tried(rate: float, seed: int, test: float, validation: float) -> dict[str, Any]:
        record = record_of(Run("mnist-mlp-3", "every", DEFAULT, seed, rate), test)
        record["metrics"] |= {"test_error": test, "val_error": validation}
        return record

    records = [tried(1e-3, 0, 1.0, 3.0), tried(1e-3, 1, 1.0, 3.0), tried(3e-3, 0, 2.0, 2.5), tried(3e-3, 1, 2.0, 2.5)]
    assert {record["learning_rate"] for record in accuracy.best_rate(records, metric)} == {3e-3}
    higher = replace(metric, better="higher")
    assert {record["learning_rate"] for record in accuracy.best_rate(records, higher)} == {1e-3}
    # A rate with fewer seeds, or at which a run diverged, is not the best.
    assert {record["learning_rate"] for record in accuracy.best_rate(records[:3], metric)} == {1e-3}
    records[2] |= {"diverged": True, "metrics": {}}
    assert {record["learning_rate"] for record in accuracy.best_rate(records, metric)} == {1e-3}
    assert accuracy.best_rate([], metric) == []


def test_behind():
    metric = Metric("m", "m", "m", 2)
    assert metric.behind(3.0, 2.0) == 1.0
    assert replace(metric, better="higher").behind(3.0, 2.0) == -1.0
    assert replace(metric, relative=True).behind(3.0, 2.0) == 50.0


def test_controls_stand_in_the_table_of_every_split_and_may_have_other_batches():
    twice = record_of(Run("char-small", WHOLE, "backpropagation, twice the batch", 0, 1e-3), 1.9, fingerprint=99)
    nadam = record_of(Run("char-small", WHOLE, "backpropagation, NAdam", 0, 1e-3), 2.01)
    cut = [record_of(Run("char-small", split, DEFAULT, 0, 1e-3), 2.02) for split in ("2 stages", "4 stages")]
    text = accuracy.table([base(0, 2.0, "char-small"), twice, nadam, *cut])
    assert text.count("| backpropagation, NAdam | 2.0100 | +0.0100 | - | - |") == 2
    assert text.count("| backpropagation, twice the batch | 1.9000 | -0.1000 | - | - |") == 2
