"""The summary at the end of a training: it has every boundary, and says what to compare."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sg import SyntheticGradients
from lightning_sg.lightning_api import LOGGER
from lightning_sg.run_summary import Times, folder_of
from lightning_sg.run_summary import lines as summary
from lightning_sg.step_clock import Shares
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks

NAMES = ["net.1", "net.3", "net.5"]


class Heard(logging.Handler):
    """The messages of Lightning's logger, while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> Heard:
        logging.getLogger(LOGGER).addHandler(self)
        return self

    def __exit__(self, *_error: object) -> None:
        logging.getLogger(LOGGER).removeHandler(self)


def train(folder: Path, boundaries: list[str] | None = None, **arguments: Any) -> list[str]:
    logger = CSVLogger(folder, name="run", version=0)
    callback = SyntheticGradients(boundaries=boundaries)
    trainer = make_trainer(logger=logger, callbacks=[callback], log_every_n_steps=1, **arguments)
    with Heard() as heard:
        trainer.fit(Classifier(), loader(), loader(shuffle=False))
    lines = heard.said
    begun = [place for place, line in enumerate(lines) if line.startswith("Synthetic gradients at the end")]
    return lines[begun[0] :] if begun else []


def check(lines: list[str], folder: Path, processes: list[str]) -> None:
    assert "ms a step" in lines[1]
    assert lines[2].split() == ["process", "compute", "predictor", "waiting", "other"]
    for line, process in zip(lines[3:], processes):
        words = re.fullmatch(rf"  {process} +(\d+)% +(\d+)% +(\d+)% +(\d+)%", line)
        assert words, line
        assert 98 <= sum(map(int, words.groups())) <= 102
        assert int(words[1]) > 0
    rest = lines[3 + len(processes) :]
    assert [line.split("'")[1] for line in rest[:3]] == NAMES
    assert f"lightning-sg report {folder / 'run' / 'version_0'} --baseline" in rest[3]


def test_one_process(tmp_path: Path) -> None:
    check(train(tmp_path), tmp_path, ["this one"])


def test_several_processes_say_it_once(tmp_path: Path) -> None:
    said = run_ranks(2, lambda: train(tmp_path, devices=2, strategy="synthetic_gradients"))
    check(said[0], tmp_path, ["rank 1, up to 'net.3'", "rank 0, up to the loss"])
    assert said[1] == []


def test_plain_training_has_none(tmp_path: Path) -> None:
    assert train(tmp_path, boundaries=[]) == []


@pytest.mark.parametrize(
    ("cosine", "words"),
    [(-0.2, "point away"), (0.03, "by itself says little"), (0.3, "in part"), (0.9, "well aligned")],
)
def test_a_cosine_is_put_into_words(cosine: float, words: str) -> None:
    metrics = {"sg/net.1/cosine": torch.tensor(cosine), "sg/cosine": torch.tensor(cosine), "loss": torch.tensor(1.0)}
    [_title, line, _next] = summary(metrics, ["net.1", "net.3"], Times(), "command")
    assert f"cosine {cosine:.2f}" in line
    assert words in line


class WandbLogger:
    """Stands for Lightning's, which keeps a run's files in a folder of the run."""

    def __init__(self, files: str) -> None:
        self.experiment = SimpleNamespace(dir=files)


def test_the_next_command_names_the_log_of_the_run() -> None:
    assert folder_of(WandbLogger("here/wandb/offline-run-1/files")) == str(Path("here/wandb/offline-run-1"))
    assert folder_of(WandbLogger("")) is None
    assert folder_of(SimpleNamespace(log_dir="outputs/version_0")) == "outputs/version_0"
    assert folder_of(SimpleNamespace()) is None


def test_processes_are_numbered_as_a_run_numbers_them() -> None:
    shares = {"b": Shares(1.0), "a": Shares(0.5, 0.25, 0.25), "": Shares(waiting=1.0)}
    metrics = {"sg/a/cosine": 0.5, "sg/b/cosine": 0.5}
    said = summary(metrics, ["a", "b"], Times(3.0, 20, shares), "command")
    assert said[1] == "  3.0 ms a step, the median of the last 20"
    assert [line.split("  ")[1] for line in said[3:6]] == [
        "rank 2, up to 'a'",
        "rank 1, up to 'b'",
        "rank 0, up to the loss",
    ]
    assert said[3].split()[-4:] == ["50%", "25%", "25%", "0%"]
    assert said[-1].endswith(": command")
