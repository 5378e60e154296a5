"""Reading a run: from metrics.csv or event files, intact, damaged or missing."""

from __future__ import annotations

import math
import sys

import pytest

from lightning_sg.tools.report import ReportError, read_run
from lightning_sg.tools.report.compare import final
from lightning_sg.tools.report.run import METRICS, Series
from tests.tools.report.runs import make_run, write


def test_missing_values_missing_keys_and_unknown_keys(tmp_path):
    path = write(
        tmp_path / METRICS,
        [
            {"step": 4, "epoch": 0, "train_loss": 2.0, "sg/net.2/cosine": 0.1, "sg/net.10/new": 7},
            {"step": 9, "epoch": 0, "val_loss": 1.5},
            {"step": 9, "epoch": 1, "train_loss": 1.0, "sg/net.2/cosine": -0.2},
        ],
    )
    run = read_run(tmp_path)
    assert run.path == path
    assert run.metrics == {"train_loss": Series([4, 9], [2.0, 1.0]), "val_loss": Series([9], [1.5])}
    assert list(run.boundaries) == ["net.2", "net.10"]
    assert run.boundaries["net.2"] == {"cosine": Series([4, 9], [0.1, -0.2])}
    assert run.boundaries["net.10"] == {"new": Series([4], [7.0])}
    assert (run.epochs, run.first_step, run.last_step, run.notes) == (2, 4, 9, [])
    assert read_run(path).metrics == run.metrics


def test_newest_version_with_a_log_is_read_and_named(tmp_path):
    for version in (2, 9, 10):
        write(tmp_path / f"version_{version}" / METRICS, [{"step": 0, "loss": float(version)}])
    run = read_run(tmp_path)
    assert run.metrics["loss"].values == [10.0]
    assert "version_10" in run.notes[0]
    (tmp_path / "version_11").mkdir()
    run = read_run(tmp_path)
    assert run.path.parent.name == "version_10"
    assert "version_11 has nothing logged" in run.notes[0].replace(str(tmp_path) + "/", "")


def test_resumed_run_keeps_the_later_row_of_a_step(tmp_path):
    write(
        tmp_path / METRICS, [{"step": step, "loss": value} for step, value in ((0, 3.0), (5, 2.0), (3, 9.0), (5, 1.0))]
    )
    assert read_run(tmp_path).metrics["loss"] == Series([0, 3, 5], [3.0, 9.0, 1.0])


def test_intact_rows_of_a_damaged_file_are_read(tmp_path):
    (tmp_path / METRICS).write_text("epoch,step,loss,other\n0,1,2.5,1\n0,two,1,1\n\n0,3,oops,2\n0,4,1.5,3,9\n0,5,1")
    run = read_run(tmp_path)
    assert run.metrics == {"loss": Series([1], [2.5]), "other": Series([1, 3], [1.0, 2.0])}
    assert "3 damaged row(s)" in run.notes[0]
    assert "1 cell(s)" in run.notes[1]


def test_logged_nan_is_noted_and_nan_for_a_missing_value_is_not(tmp_path):
    write(tmp_path / "a" / METRICS, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 2, "val": 3}])
    run = read_run(tmp_path / "a")
    assert "loss was NaN or infinite at 1 logged step(s), the first at step 2" in run.notes[0]
    assert math.isnan(final(run.metrics["loss"], smoothed=True))
    write(tmp_path / "b" / METRICS, [{"step": 1, "loss": 1.0, "val": "nan"}, {"step": 2, "loss": "nan", "val": 2}])
    run = read_run(tmp_path / "b")
    assert run.notes == []
    assert run.metrics == {"loss": Series([1], [1.0]), "val": Series([2], [2.0])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"step,epoch,loss\r\n", "has no values"),
        (b"step,epoch,loss\r\n0,0,\r\n", "has no values"),
        (b"a,b\r\n1,2\r\n", "no column 'step'"),
        (b"step,loss\n\xff\xfe\x00", "not a text file"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, content, message):
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(ReportError, match=message):
        read_run(tmp_path)


def test_folder_without_metrics_names_the_runs_below_it(tmp_path):
    with pytest.raises(ReportError, match=r"has no metrics\.csv\. Give the folder"):
        read_run(tmp_path)
    make_run(tmp_path / "mnist" / "version_0")
    with pytest.raises(ReportError, match=r"runs below it: .*version_0"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="does not exist"):
        read_run(tmp_path / "nothing")


def test_tensorboard_run(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="run")
    for step in range(3):
        logger.log_metrics({"loss": 1.0 / (1 + step), "sg/net.2/cosine": 0.5, "epoch": step}, step)
    logger.finalize("success")
    for path in (tmp_path / "run", next((tmp_path / "run").rglob("*tfevents*"))):
        run = read_run(path)
        assert run.metrics["loss"].values == pytest.approx([1, 1 / 2, 1 / 3])
        assert run.boundaries["net.2"]["cosine"].steps == [0, 1, 2]
        assert run.epochs == 3


def test_missing_tensorboard_is_named(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ReportError, match="pip install tensorboard"):
        read_run(tmp_path)
