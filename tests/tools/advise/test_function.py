"""``lightning_sg.advise``: measures real trainings, tries several cuts, and leaves the model alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sg import SyntheticGradients, SyntheticGradientsError, advise
from lightning_sg.settings import Settings
from lightning_sg.tools.advise.function import _candidates
from tests.models import Classifier, dataset, loader


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


class Broken(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise ArithmeticError("the third batch")
        return super().training_step(batch, batch_idx)


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("start", "data"), [("fork", loader()), ("spawn", Data())], ids=["fork", "spawn"])
def test_measures_a_module(start: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    cuts = [["net.1"], ["net.3"]]
    made = advise(module, data, SyntheticGradients(delay=2), cuts=cuts, steps=8, start_method=start)
    assert [trial.names for trial in made.trials] == cuts
    assert made.plain.processes == 1
    for trial in made.trials:
        assert trial.measured.processes == 2
        assert trial.measured.milliseconds > 0
        assert len(trial.measured.memory) == 2
        assert set(trial.measured.cosines) == set(trial.names or ())
    assert made.best.names in cuts
    assert set(made.price) == {"train_loss"}
    assert made.price["train_loss"] == pytest.approx(
        made.best.measured.losses["train_loss"] - made.plain.losses["train_loss"]
    )
    assert made.overhead.split >= 0
    said = str(made)
    assert "Speed: " in said
    assert "peak memory, MiB" in said
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert module._trainer is None
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_a_training_that_fails_is_an_error_with_the_reason() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"plain backpropagation failed[\s\S]*the third batch"):
        advise(Broken(), loader(), steps=4, cuts=[["net.3"]], start_method="fork")


def test_what_cannot_be_pickled_is_refused_with_a_way_out() -> None:
    module = Classifier()
    module.local = lambda: None
    with pytest.raises(SyntheticGradientsError, match=r"cannot be given to another process[\s\S]*start_method='fork'"):
        advise(module, loader(), steps=4, cuts=[["net.3"]], start_method="spawn")


class Plain(pl.LightningModule):
    """Layers of equal cost, without a boundary."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 64), *(nn.Linear(64, 64) for _ in range(layers)), nn.Linear(64, 5))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def place(name: str) -> int:
    return int(name.rpartition(".")[2])


def test_without_cuts_an_earlier_and_a_later_one_than_the_automatic_one_are_tried() -> None:
    found = _candidates(Plain(8), loader(), Settings(), 2)
    assert all(len(names) == 1 for names in found)
    middle, earlier, later = (place(names[0]) for names in found)
    assert earlier < middle < later


def test_the_cuts_of_the_model_come_first() -> None:
    assert _candidates(Classifier(), Data(), Settings(), 2)[0] == ["net.1", "net.3", "net.5"]
    assert _candidates(Classifier(), Data(), Settings(boundaries=["net.2"]), 2)[0] == ["net.2"]


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    class Single(Plain):
        def __init__(self) -> None:
            super().__init__(0)
            self.net = nn.Linear(12, 5)

    with pytest.raises(SyntheticGradientsError, match="finds nowhere to cut Single"):
        advise(Single(), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": nn.Linear(2, 2)}, r"advise\(module="),
        ({"data": 3}, r"advise\(data="),
        ({"data": [dataset(), dataset()]}, "one loader"),
        ({"callback": "auto"}, r"advise\(callback="),
        ({"processes": 1}, r"advise\(processes="),
        ({"processes": 2.0}, r"advise\(processes="),
        ({"cuts": "net.1"}, r"advise\(cuts="),
        ({"cuts": ["net.1"]}, r"advise\(cuts="),
        ({"steps": 3}, r"advise\(steps="),
        ({"trainer": {"devices": 4}}, r"advise\(trainer=\.\.\.\): devices"),
        ({"trainer": 5}, r"advise\(trainer="),
        ({"start_method": "popen"}, r"advise\(start_method="),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, SyntheticGradientsError), match=message):
        advise(**{"module": Plain(3), "data": loader(), **arguments})
