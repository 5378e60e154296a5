"""The comparisons with backpropagation: arithmetic of the tables, resuming, runs that diverge."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import accuracy, multirate, recurrent, runs, time_to_quality, training, unlocked
from benchmarks.runs import Run, execute, read, run_of
from benchmarks.tasks import ALL_METHODS, BACKPROPAGATION, TASKS, WHOLE, Metric
from lightning_sg import SyntheticGradients
from tests.test_examples import random_digits

DEFAULT = "synthetic gradients"
ERROR = TASKS["mnist-mlp-3"].metric


def record_of(run: Run, value: float | None, **others: Any) -> dict[str, Any]:
    metric = TASKS[run.task].metric
    return {
        **asdict(run),
        "metrics": {} if value is None else {metric.key: value, metric.watched: value, "val_loss": value},
        "diverged": value is None,
        "error": None,
        "curve": [],
        "steps": 100,
        "seconds": 10.0,
        "fingerprint": run.seed,
        **others,
    }


def base(seed: int, value: float | None, task: str = "mnist-mlp-3", **others: Any) -> dict[str, Any]:
    return record_of(Run(task, WHOLE, BACKPROPAGATION, seed, 1e-3), value, **others)


def decoupled(seed: int, value: float | None, task: str = "mnist-mlp-3", split: str = "every", **others: Any):
    return record_of(Run(task, split, DEFAULT, seed, 1e-3), value, **others)


def line(text: str, begins: str, number: int = -1) -> list[str]:
    """The columns of a row."""
    rows = [row for row in text.splitlines() if row.startswith(f"| {begins}")]
    return [column.strip() for column in rows[number].strip("|").split("|")]


# ---------------------------------------------------------------------- accuracy: the table


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


# ---------------------------------------------------------------------- runs: what there is to do


def test_backpropagation_runs_once_for_all_splits():
    options = SimpleNamespace(
        seeds=[0, 1],
        tasks=["hard-mlp-6"],
        learning_rates=[1e-3, 3e-3],
        methods=[BACKPROPAGATION, DEFAULT],
        splits=None,
        budget=1.0,
    )
    planned = accuracy.plan(options)
    assert len(planned) == len(set(planned)) == 2 * 2 * (1 + 2)
    assert {run.split for run in planned if run.method == BACKPROPAGATION} == {WHOLE}
    assert {run.split for run in planned if run.method == DEFAULT} == {"every", "four"}


def test_resume_skips_what_the_file_has(tmp_path, monkeypatch):
    started = []

    def fake(module: str, arguments: list[str]) -> list[dict[str, Any]]:
        run = Run(**json.loads(arguments[arguments.index("--run") + 1]))
        started.append(run)
        if run.seed == 2:
            raise RuntimeError("out of luck")
        return [record_of(run, None if run.seed == 1 else 1.0)]

    monkeypatch.setattr(runs, "run_workers", fake)
    planned = [Run("regression", "3 stages", DEFAULT, seed, 1e-3) for seed in (0, 1, 2)]
    path = tmp_path / "results.jsonl"
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        execute(planned, path, [], jobs=2)
    assert [run_of(record) for record in sorted(read(path), key=lambda record: record["seed"])] == planned[:2]
    started.clear()
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        execute(planned, path, [])
    assert started == planned[2:]  # a diverged run is a result, a failed one is not
    started.clear()
    other = [replace(planned[0], learning_rate=3e-3), replace(planned[0], budget=2.0), replace(planned[0], devices=2)]
    execute([*other, other[0]], path, [])
    assert started == other


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(base(0, 1.0)) + '\n{"task": "mni')
    with pytest.raises(ValueError, match=r"Line 2 of .*results\.jsonl"):
        read(path)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="Line 1"):
        read(path)


def test_missing_folder_is_named():
    options = SimpleNamespace(mnist=None, shakespeare="here")
    assert runs.folder_arguments(options, [None, "shakespeare"]) == ["--shakespeare", "here"]
    with pytest.raises(SystemExit, match="--mnist"):
        runs.folder_arguments(options, ["mnist"])


# ---------------------------------------------------------------------- one training


@pytest.fixture
def small(monkeypatch):
    """A training of a few steps."""
    task = TASKS["regression"]
    monkeypatch.setitem(TASKS, "regression", replace(task, data=lambda root, seed: training_data(), epochs=1))


def training_data():
    from examples.regression import Housing

    return Housing(samples=200, batch_size=16)


def test_training_is_recorded(small):
    plain = training.train(Run("regression", WHOLE, BACKPROPAGATION, 0, 1e-3, points=3), {})
    cut = training.train(Run("regression", "3 stages", DEFAULT, 0, 1e-3, points=3), {})
    assert plain is not None
    assert cut is not None
    for record in (plain, cut):
        assert record["steps"] == 140 // 16
        assert [step for step, _, _ in record["curve"]] == [3, 6, 8]
        assert not record["diverged"]
        assert record["metrics"]["test_loss"] > 0
        assert record["curve"][-1][2] == pytest.approx(record["metrics"]["val_loss"])
        assert 0 < record["curve"][0][1] < record["seconds"]
    assert plain["fingerprint"] == cut["fingerprint"]
    other = training.train(Run("regression", WHOLE, BACKPROPAGATION, 1, 1e-3), {})
    assert other is not None
    assert other["fingerprint"] != plain["fingerprint"]


@pytest.mark.parametrize(("split", "method"), [(WHOLE, BACKPROPAGATION), ("3 stages", DEFAULT)])
def test_diverged_training_is_recorded(small, monkeypatch, split, method):
    def broken(self, batch):
        return (self(batch[0]) * float("nan")).mean()

    monkeypatch.setattr("examples.regression.RegressionMLP._squared_error", broken)
    record = training.train(Run("regression", split, method, 0, 1e-3), {})
    assert record is not None
    assert record["diverged"]
    json.loads(json.dumps(record, allow_nan=False))


def test_finite():
    assert training.finite(torch.tensor(1.5)) == 1.5
    assert training.finite(float("nan")) is None
    assert training.finite(float("inf")) is None


# ---------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_cut_their_models(name):
    task = TASKS[name]
    assert task.judged
    assert task.halves in task.splits
    sizes = set()
    for split in task.splits.values():
        model = task.model(learning_rate=1e-2, **split.model)
        assert model.learning_rate == 1e-2
        sizes.add(sum(parameter.numel() for parameter in model.parameters()))
    assert len(sizes) == 1


@pytest.mark.parametrize("method", ALL_METHODS.values(), ids=ALL_METHODS.keys())
def test_methods_are_made(method):
    assert method is None or isinstance(method.callback(), SyntheticGradients)


# ---------------------------------------------------------------------- time to quality


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


# ---------------------------------------------------------------------- unlocked stages


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


# ---------------------------------------------------------------------- recurrent networks


def test_recurrent_runs_are_planned_and_one_is_trained():
    planned = recurrent.plan(["copy", "text"], [0, 1], None, 7)
    assert len(planned) == len(set(planned)) == 2 * (4 * 4 + 1 + 5)
    assert {run.updates for run in planned} == {7}
    record = recurrent.train(recurrent.Run("copy", recurrent.AUXILIARY, 2, 0, 10), None)
    assert record["solved"] == 0
    assert len(record["curve"]) == 10


def test_recurrent_table_has_means_and_ranges():
    def record(task: str, method: str, chunk: int, seed: int, **others: Any) -> dict[str, Any]:
        return {"task": task, "method": method, "chunk": chunk, "seed": seed, "updates": 100, **others}

    records = [record("copy", recurrent.TRUNCATED, 3, seed, solved=4 + seed) for seed in (0, 1)]
    records += [record("copy", recurrent.SYNTHETIC, 5, 0, solved=9)]
    records += [record("text", recurrent.TRUNCATED, 8, 0, bits=2.5)]
    records += [{**record("copy", recurrent.SYNTHETIC, 5, 0, solved=11), "updates": 200}]
    printed = recurrent.table(records)
    assert "| truncated | 4.5 (4-5, 2 seeds) | - |" in printed
    assert "| synthetic gradients | - | 9 |" in printed
    assert "copy, 200 updates\n\n| | T = 5 |\n|---|---|\n| synthetic gradients | 11 |" in printed
    assert "| truncated | 2.500 |" in printed


@pytest.mark.parametrize("method", multirate.METHODS)
def test_networks_at_different_rates_see_the_same_digits_with_every_method(monkeypatch, method):
    digits = random_digits()
    data = SimpleNamespace(setup=lambda stage: None, train_set=digits, val_set=digits)
    monkeypatch.setattr(multirate, "Mnist", lambda folder: data)
    monkeypatch.setattr(multirate, "STREAMS", 4)
    monkeypatch.setattr(multirate, "LOOK", 64)
    record = multirate.train(method, 0, 128, "nowhere")
    assert record["steps"] == (128 // 16 if method == multirate.COUPLED else 128 // 4)
    assert [point["digits"] for point in record["curve"]] == [64, 128]


def test_multirate_table_says_when_a_share_of_the_coupled_accuracy_was_reached():
    def record(method: str, odd: list[float]) -> dict[str, Any]:
        curve = [{"digits": 640 * (n + 1), "odd": value, "threes": 10.0} for n, value in enumerate(odd)]
        return {"method": method, "seed": 0, "digits": 9600, "steps": 7, "seconds": 1.0, "curve": curve}

    records = [record(multirate.COUPLED, [50, 90, 90, 90]), record(multirate.NONE, [20, 30, 40, 50])]
    printed = multirate.table(records, 9600)
    assert "A is at 81.0 %" in printed
    assert "| coupled | 7 | 90.0 | 10.0 | 1,280 | 640 | 1 | 1 |" in printed
    assert "| no gradient | 7 | 40.0 | 10.0 | - (1 of 1 never) | 640 | 1 | 1 |" in printed
