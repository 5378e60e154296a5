"""The plan of a split: it agrees with the run, and refuses what a run refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg import (
    BoundaryError,
    DelayedGradient,
    LateGradients,
    LocalLoss,
    LossModelPredictor,
    PartitionError,
    SyntheticGradients,
    SyntheticGradientsError,
    TrueGradient,
)
from lightning_sg.partition.trace import Trace
from lightning_sg.tools.plan import BoundaryPlan, Plan, StagePlan, plan
from tests.models import Classifier, loader, make_trainer
from tests.partition.models import trace
from tests.ranks import run_ranks

BATCH = next(iter(loader()))
BOUNDARIES = ["net.1", "net.3", "net.5"]


def test_stages_and_boundaries_of_a_model() -> None:
    model = Classifier()
    before = [dict(vars(module)) for module in model.modules()]
    planned = plan(model, BATCH)
    assert [boundary.name for boundary in planned.boundaries] == BOUNDARIES
    assert sum(stage.parameters for stage in planned.stages) == sum(p.numel() for p in model.parameters())
    hidden = 16
    assert [boundary.bytes for boundary in planned.boundaries] == [4 * len(BATCH[0]) * hidden] * len(BOUNDARIES)
    assert all("LossModelPredictor" in boundary.predictor for boundary in planned.boundaries)
    assert not any(boundary.between_processes for boundary in planned.boundaries)
    assert [vars(module) for module in model.modules()] == before, "the model is left as it was"


def test_predictors_cost_what_a_run_logs() -> None:
    callback = SyntheticGradients()
    trainer = make_trainer(max_epochs=1, max_steps=80, callbacks=[callback])  # at the start heads look at every target
    trainer.fit(Classifier(), loader(samples=80 * len(BATCH[0]), batch_size=len(BATCH[0]), shuffle=False))
    planned = plan(Classifier(), BATCH)
    model = 3 * sum(stage.flops for stage in planned.stages)
    for boundary in planned.boundaries:
        logged = float(trainer.callback_metrics[f"sg/{boundary.name}/cost"])
        assert boundary.flops / model == pytest.approx(logged, rel=0.02)


@pytest.mark.parametrize("predictor", [TrueGradient(), DelayedGradient()])
def test_exact_gradients_cost_nothing(predictor: Any) -> None:
    planned = plan(Classifier(), BATCH, SyntheticGradients(predictor=predictor))
    assert [boundary.cost for boundary in planned.boundaries] == [0.0] * len(BOUNDARIES)


class TrainedStages(pl.Callback):
    """Notes the stages that this process trains: those whose parameters get gradients."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = [name for name, parameter in pl_module.named_parameters() if parameter.grad is not None]
        self.stages = sorted({sum(cut < name for cut in BOUNDARIES) for name in trained})


def trained_stages(devices: int) -> list[int]:
    trained = TrainedStages()
    trainer = make_trainer(strategy="synthetic_gradients", devices=devices, max_steps=2, callbacks=[trained])
    trainer.fit(Classifier(), loader())
    return trained.stages


def test_processes_train_the_planned_stages() -> None:
    planned = plan(Classifier(), BATCH, processes=2)
    last, first = run_ranks(2, partial(trained_stages, 2))
    assert [(stage, each.process) for stage, each in enumerate(planned.stages)] == [
        *((stage, 0) for stage in first),
        *((stage, 1) for stage in last),
    ]
    assert sum(boundary.between_processes for boundary in planned.boundaries) == 1


def test_slowest_process_bounds_the_speed_up() -> None:
    stages = [StagePlan(10, 100, 300.0, 0), StagePlan(10, 100, 300.0, 1), StagePlan(10, 100, 200.0, 1)]
    cuts = [BoundaryPlan("a", 2**20, "one", 100.0, True), BoundaryPlan("b", 2**19, "one", 100.0, False)]
    planned = Plan(stages, cuts, 2)
    assert planned.loads == [400.0, 600.0]
    assert planned.bottleneck == 1
    assert planned.speedup == pytest.approx(800 / 600)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(PartitionError, match="9 processes but only 4 stages"):
        plan(Classifier(), BATCH, processes=9)
    with pytest.raises(BoundaryError, match="is not a submodule"):
        plan(Classifier(), BATCH, SyntheticGradients(boundaries=["nothing"]))


class Unlabelled(Classifier):
    """Has a loss that does not reveal the number of classes, and a step that takes only the batch."""

    def training_step(self, batch: Any) -> torch.Tensor:
        return self(batch[0]).square().mean()


def test_unfit_predictors_are_named() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"names the boundaries \['other'\]"):
        plan(Classifier(), BATCH, SyntheticGradients(predictor={"other": LossModelPredictor()}))
    with pytest.raises(
        SyntheticGradientsError, match=r"LossModelPredictor at boundary 'net.1': .* beyond the 2 classes"
    ):
        plan(Unlabelled(), BATCH, SyntheticGradients(predictor=LossModelPredictor(classes=2), context=1))


class Unrunnable(pl.LightningModule):
    """Reads a value, which a fake tensor does not have, before its last boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        h = self.first(batch[0])
        return self.last(h * h.mean().item()).mean()


def test_step_that_cannot_run_on_fake_tensors_is_refused() -> None:
    with pytest.raises((PartitionError, BoundaryError)):
        plan(Unrunnable(), BATCH, SyntheticGradients(boundaries=["first", "last"]))


class Operations(pl.Callback):
    """Counts the floating-point operations of the batches after the first ones, in which no late gradient has come."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.batches = 0
        self.counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += batch_idx >= self.first
        if trainer.is_last_batch:
            self.counter.__exit__(None, None, None)

    @property
    def of_batch(self) -> float:
        return self.counter.get_total_flops() / self.batches


def operations_of_batch(late: LateGradients | None) -> float:
    count = Operations(first=12)
    callback = SyntheticGradients(predictor=LocalLoss(), late=late)
    trainer = make_trainer(max_epochs=1, callbacks=[callback, count])
    trainer.fit(Classifier(), loader(samples=36 * len(BATCH[0]), batch_size=len(BATCH[0]), shuffle=False))
    return count.of_batch


@pytest.mark.parametrize("every", [1, 4])
def test_late_gradients_cost_what_a_run_computes(every: int) -> None:
    late = LateGradients(0.5, every)
    added = late_flops(late)
    first, *middle, last = traced().flops
    # Only where somebody wants it does the last stage compute the gradient of its input.
    measured = operations_of_batch(late) - operations_of_batch(None)
    assert measured == pytest.approx(sum(added) + last / every)
    # The first layer computes no gradient of its input.
    assert added == [first / every, *(2 * flops / every for flops in middle)]


def traced() -> Trace:
    module = Classifier()
    return trace(module, BATCH, lambda: module.training_step(BATCH, 0))


def late_flops(late: LateGradients) -> list[float]:
    callback = SyntheticGradients(late=late)
    return [work.flops for work in callback.settings.factory([]).late_work(traced()).values()]


def test_running_a_batch_again_costs_its_forward_pass() -> None:
    forward = traced().flops[:-1]
    again = late_flops(LateGradients(share=0.5, recompute=True))
    assert again == [more + flops for more, flops in zip(late_flops(LateGradients(share=0.5)), forward)]
    assert late_flops(LateGradients(share=1, recompute=True)) == forward
    # In place of the backward pass of the newest batch.
    assert late_flops(LateGradients(share=1)) == [0.0, 0.0, 0.0]


def test_late_gradients_count_when_stages_are_spread() -> None:
    """Every stage but the last goes backward twice, so the last process can take more of them."""
    model = Classifier()
    alone = plan(model, BATCH, SyntheticGradients(predictor=LocalLoss()), 2)
    late = plan(model, BATCH, SyntheticGradients(predictor=LocalLoss(), late=LateGradients(0.5)), 2)
    assert late.model_cost == alone.model_cost
    assert max(late.loads) > max(alone.loads)
    assert late.speedup < alone.speedup
    ruled = plan(model, BATCH, SyntheticGradients(predictor=TrueGradient(), late=LateGradients(0.5)), 2)
    assert ruled.loads == plan(model, BATCH, SyntheticGradients(predictor=TrueGradient()), 2).loads
