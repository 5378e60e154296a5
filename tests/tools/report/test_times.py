"""Runs over time: where seconds come from, and what is drawn over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sg import SyntheticGradients
from lightning_sg.tools.report import read_run, report
from lightning_sg.tools.report.run import METRICS, Run, Series
from lightning_sg.tools.report.times import over_seconds, step_milliseconds, take_seconds
from tests.models import Classifier, loader, make_trainer
from tests.tools.report.runs import make_run, size_of_png, write


def timed(folder: Path, pace: float, column: str = "sg/seconds") -> Path:
    """A run of 100 steps, each of which takes ``pace`` seconds."""
    rows = [{"step": step, "train_loss": 1 / (1 + step), column: pace * (step + 1)} for step in range(0, 100, 5)]
    rows += [{"step": step, "val_loss": 1.0} for step in (49, 99)]
    write(folder / METRICS, rows)
    return folder


def test_values_between_logged_times_are_interpolated() -> None:
    run = Run(Path(), {}, {}, seconds=Series([10, 20], [1.0, 3.0]))
    assert over_seconds(Series([5, 10, 15, 20, 30], [5.0, 4.0, 3.0, 2.0, 1.0]), run) == Series(
        [1.0, 1.0, 2.0, 3.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    )
    alone = Run(Path(), {}, {}, seconds=Series([10], [1.0]))
    assert over_seconds(Series([5, 15], [1.0, 2.0]), alone).steps == [1.0, 1.0]


def test_a_resumed_run_goes_on_counting() -> None:
    points = {"sg/seconds": {0: 1.0, 10: 2.0, 20: 0.5, 30: 1.5}}
    assert take_seconds(points).values == [1.0, 2.0, 2.0, 3.0]
    assert not points


def test_the_clock_of_the_log_serves_where_no_seconds_were_logged() -> None:
    assert take_seconds({}, {3: 1000.0, 5: 1004.0}) == Series([3, 5], [0.0, 4.0])
    assert take_seconds({"sg/seconds": {3: 7.0}}, {3: 1000.0, 5: 1004.0}) == Series([3], [7.0])
    assert take_seconds({}) == Series()


@pytest.mark.parametrize("column", ["sg/seconds", "train|time"])
def test_a_csv_log_may_have_seconds(column: str, tmp_path: Path) -> None:
    run = read_run(timed(tmp_path, 0.5, column))
    assert run.seconds.values[:2] == [0.5, 3.0]
    assert set(run.metrics) == {"train_loss", "val_loss"}
    assert step_milliseconds(run).values == pytest.approx([500.0] * 19)


def test_logged_milliseconds_are_taken_as_they_are() -> None:
    run = Run(Path(), {"sg/step_ms": Series([3], [12.0])}, {}, seconds=Series([1, 3], [0.0, 9.0]))
    assert step_milliseconds(run) == Series([3], [12.0])


def test_a_report_draws_runs_over_seconds(tmp_path: Path) -> None:
    fast, slow, none = timed(tmp_path / "fast", 0.5), timed(tmp_path / "slow", 1.0), make_run(tmp_path / "none")
    made = report(fast, [slow, none])
    page = made.paths[0].read_text()
    assert "Without times in the log, and so not drawn: none." in page
    [picture] = [path for path in made.paths if path.name == "time.png"]
    assert size_of_png(picture.read_bytes())[0] > 500
    [seconds] = [row for row in made.rows if row.metric == "seconds"]
    assert seconds.values == [48.0, 96.0, None]
    assert seconds.differences == [-48.0, None]


def test_a_run_without_times_has_no_such_picture(tmp_path: Path) -> None:
    made = report(make_run(tmp_path / "none"), [timed(tmp_path / "timed", 1.0)])
    assert "time.png" not in [path.name for path in made.paths]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_other_logs_have_a_clock_of_their_own(kind: str, tmp_path: Path) -> None:
    """Without the callback, nothing else says when a step was."""
    pytest.importorskip(kind)
    from lightning.pytorch import loggers

    if kind == "wandb":
        logger = loggers.WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    else:
        logger = loggers.TensorBoardLogger(tmp_path, name="run", version=0)
    make_trainer(logger=logger, log_every_n_steps=1).fit(Classifier(), loader())
    if kind == "wandb":
        from tests.offline_wandb import finish

        finish(tmp_path)
    seconds = read_run(tmp_path if kind == "wandb" else tmp_path / "run").seconds
    assert list(seconds.steps) == list(range(10))
    assert seconds.values[0] == 0
    assert 0 < seconds.values[-1] < 60
    assert seconds.values == sorted(seconds.values)


def test_a_run_of_the_callback_has_its_seconds_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    trainer = make_trainer(logger=logger, log_every_n_steps=1, callbacks=[SyntheticGradients(boundaries=[])])
    trainer.fit(Classifier(), loader())
    run = read_run(tmp_path / "run")
    assert run.seconds.values[0] > 0
    assert "sg/step_ms" in run.metrics
    assert "sg/seconds" not in run.metrics
