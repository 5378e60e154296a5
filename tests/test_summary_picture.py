"""The picture of a run for Weights & Biases: it is there once, at the end, and its lack does no harm."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lightning_sg import SyntheticGradients
from lightning_sg.summary_picture import _MOST, _thinned
from lightning_sg.tools.report import read_run
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks
from tests.tools.report.runs import size_of_png

pytest.importorskip("wandb")


def train(folder: Path, **arguments: Any) -> None:
    from lightning.pytorch.loggers import WandbLogger

    from tests.offline_wandb import finish

    logger = WandbLogger(project="tests", save_dir=folder, offline=True)
    trainer = make_trainer(logger=logger, log_every_n_steps=1, **{"callbacks": [SyntheticGradients()], **arguments})
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    finish(folder)


def pictures(folder: Path) -> list[Path]:
    return list(folder.rglob("sg/summary_*.png"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_ends_with_one_picture(processes: int, tmp_path: Path) -> None:
    if processes == 1:
        train(tmp_path)
    else:
        run_ranks(2, lambda: train(tmp_path, devices=2, strategy="synthetic_gradients"))
    [picture] = pictures(tmp_path)
    width, height = size_of_png(picture.read_bytes())
    assert width > 1000
    assert height > 300
    assert not [name for name in read_run(tmp_path).series() if "summary" in name]  # a picture is no metric


def test_plain_training_has_none(tmp_path: Path) -> None:
    train(tmp_path, callbacks=[SyntheticGradients(boundaries=[])])
    assert not pictures(tmp_path)


def test_without_matplotlib_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    train(tmp_path)
    assert not pictures(tmp_path)


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.warns(UserWarning, match=r"could not be made: no space left"):
        train(tmp_path)
    assert not pictures(tmp_path)


def test_long_runs_keep_a_bounded_number_of_points() -> None:
    points: list[int] = []
    for step in range(10 * _MOST):
        points = _thinned([*points, step])
    assert _MOST // 2 <= len(points) <= _MOST
    assert points[-1] == 10 * _MOST - 1
    assert points == sorted(points)
