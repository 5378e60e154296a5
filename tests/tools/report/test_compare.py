"""The numbers of a report: final values, differences, metrics of boundaries, and remarks."""

from __future__ import annotations

import pytest

from lightning_sg.tools.report import read_run, report
from lightning_sg.tools.report.compare import boundary_metrics, compare
from lightning_sg.tools.report.run import METRICS
from tests.tools.report.runs import make_run, write


def test_final_values_and_differences(tmp_path):
    values = [float(value) for value in range(100)]
    run = [{"step": step, "epoch": 0, "train_loss": value} for step, value in enumerate(values)]
    run += [{"step": 99, "epoch": 0, "val_loss": 0.75}, {"step": 99, "epoch": 0, "only": 1.0}]
    other = [{"step": step, "epoch": 0, "train_loss": 2 * value} for step, value in enumerate(values)]
    other += [{"step": 99, "epoch": 0, "val_loss": 0.5}]
    write(tmp_path / "run" / METRICS, run)
    write(tmp_path / "other" / METRICS, other)
    rows = {row.metric: row for row in compare(read_run(tmp_path / "run"), [read_run(tmp_path / "other")])}
    assert list(rows) == ["train_loss", "val_loss", "only"]
    assert rows["train_loss"].smoothed
    assert rows["train_loss"].values == [94.5, 189.0]  # the median of 90 ... 99, and twice that
    assert rows["train_loss"].differences == [-94.5]
    assert not rows["val_loss"].smoothed
    assert rows["val_loss"].values == [0.75, 0.5]
    assert rows["val_loss"].differences == [0.25]
    assert rows["only"].values == [1.0, None]
    assert rows["only"].differences == [None]


def test_metrics_of_a_boundary(tmp_path):
    metrics = boundary_metrics(read_run(make_run(tmp_path, ["net.1"])))["net.1"]
    assert metrics["norm_ratio"].final == pytest.approx(5.75)  # the median of 5.5 ... 6.0
    assert metrics["norm_ratio"].median == pytest.approx(3.05)
    assert (metrics["cost"].final, metrics["bootstrapped_cosine"].final) == (0.25, 0.9)
    assert metrics["guarded"].median == 0.25  # 15 of 60


def test_remarks_on_unequal_lengths_and_on_baselines_with_boundaries(tmp_path, undrawn):
    run, baseline = make_run(tmp_path / "run", ["n"]), make_run(tmp_path / "baseline", ["n"], steps=40)
    notes = " ".join(report(run, [baseline], tmp_path / "out").notes)
    assert "ends at step 59, the baseline baseline at step 39" in notes
    assert "not plain backpropagation" in notes
