"""The plan of a split: it says what the split then is."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_sg import (
    BoundaryError,
    DelayedGradient,
    LossModelPredictor,
    PartitionError,
    SyntheticGradients,
    SyntheticGradientsError,
    TrueGradient,
)
from lightning_sg.cli import main
from lightning_sg.tools.plan import BoundaryPlan, Plan, StagePlan, plan
from lightning_sg.tools.plan.command import table
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks

BATCH = next(iter(loader()))
BOUNDARIES = ["net.1", "net.3", "net.5"]


def test_stages_and_boundaries_are_those_of_the_model() -> None:
    model = Classifier()
    planned = plan(model, BATCH)
    assert [boundary.name for boundary in planned.boundaries] == BOUNDARIES
    assert sum(stage.parameters for stage in planned.stages) == sum(p.numel() for p in model.parameters())
    hidden = 16
    assert [boundary.bytes for boundary in planned.boundaries] == [4 * len(BATCH[0]) * hidden] * len(BOUNDARIES)
    assert all("LossModelPredictor" in boundary.predictor for boundary in planned.boundaries)
    assert not any(boundary.between_processes for boundary in planned.boundaries)
    assert isinstance(model.net[1], nn.Module)
    assert model.net[1]._site is None, "the model is left as it was"


def test_a_predictor_costs_what_a_run_says_it_costs() -> None:
    callback = SyntheticGradients()
    trainer = make_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(Classifier(), loader(shuffle=False))
    planned = plan(Classifier(), BATCH)
    model = 3 * sum(stage.flops for stage in planned.stages)
    for boundary in planned.boundaries:
        logged = float(trainer.callback_metrics[f"sg/{boundary.name}/cost"])
        assert boundary.cost / model == pytest.approx(logged, rel=0.02)


@pytest.mark.parametrize("predictor", [TrueGradient(), DelayedGradient()])
def test_what_predicts_nothing_costs_nothing(predictor: Any) -> None:
    planned = plan(Classifier(), BATCH, SyntheticGradients(predictor=predictor))
    assert [boundary.cost for boundary in planned.boundaries] == [0.0] * len(BOUNDARIES)


def _placement(devices: int) -> list[int]:
    trainer = make_trainer(strategy="synthetic_gradients", devices=devices, max_steps=2)
    trainer.fit(Classifier(), loader())
    placement = trainer.strategy._runtime.placement
    return [placement.process_of(stage) for stage in range(len(placement.order) + 1)]


def test_the_processes_are_those_of_the_run() -> None:
    planned = plan(Classifier(), BATCH, processes=2)
    assert [stage.process for stage in planned.stages] == run_ranks(2, partial(_placement, 2))[0]
    assert sum(boundary.between_processes for boundary in planned.boundaries) == 1


def test_the_slowest_process_bounds_the_speed_up() -> None:
    stages = [StagePlan(10, 100, 300.0, 0), StagePlan(10, 100, 300.0, 1), StagePlan(10, 100, 200.0, 1)]
    cuts = [BoundaryPlan("a", 2**20, "one", 100.0, True), BoundaryPlan("b", 2**19, "one", 100.0, False)]
    planned = Plan(stages, cuts, 2)
    assert planned.loads == [400.0, 600.0]
    assert planned.bottleneck == 1
    assert planned.speedup == pytest.approx(800 / 600)
    shown = table(planned)
    assert "process 0 50%, process 1 75%" in shown
    assert "at most 1.33 of 2; process 1 is the bottleneck" in shown
    assert "Predictor at a, b: one" in shown
    assert "predictors add 25%" in table(Plan([StagePlan(s.parameters, s.flops, s.cost, 0) for s in stages], cuts, 1))


def test_what_cannot_be_split_is_refused_as_a_run_would() -> None:
    with pytest.raises(PartitionError, match="9 processes but only 4 stages"):
        plan(Classifier(), BATCH, processes=9)
    with pytest.raises(BoundaryError, match="is not a submodule"):
        plan(Classifier(), BATCH, SyntheticGradients(boundaries=["nothing"]))


def test_predictors_that_do_not_fit_are_named() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"names the boundaries \['other'\]"):
        plan(Classifier(), BATCH, SyntheticGradients(predictor={"other": LossModelPredictor()}))
    with pytest.raises(
        SyntheticGradientsError, match=r"LossModelPredictor at boundary 'net.1': .* beyond the 2 classes"
    ):
        plan(Unlabelled(), BATCH, SyntheticGradients(predictor=LossModelPredictor(classes=2)))


class Unlabelled(Classifier):
    """Has a loss that does not tell the number of classes, and a step that takes the batch alone."""

    def training_step(self, batch: Any) -> torch.Tensor:
        return self(batch[0]).square().mean()


class Unrunnable(pl.LightningModule):
    """Reads a value before its boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        h = self.first(batch[0])
        return self.last(h * h.mean().item()).mean()


def test_a_step_that_cannot_be_followed_says_so() -> None:
    with pytest.raises((PartitionError, BoundaryError)):
        plan(Unrunnable(), BATCH, SyntheticGradients(boundaries=["first", "last"]))


def test_the_command_takes_a_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-sg", "plan", "--config", "configs/digits_2stages.yaml"])
    monkeypatch.chdir(Path(__file__).parent.parent)
    main()
    shown = capsys.readouterr().out
    assert "process 1 is the bottleneck" in shown or "process 0 is the bottleneck" in shown
    assert not [warning for warning in recwarn if "args parameter" in str(warning.message)]


def test_the_command_says_why_there_is_no_such_split() -> None:
    with pytest.raises(SystemExit, match="processes but only"):
        main(["plan", "--config", "configs/digits_2stages.yaml", "--trainer.devices", "7"])
