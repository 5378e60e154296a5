"""The oracle: a run split over processes computes what the same run computes in one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import (
    LossModelPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    TrueGradient,
    ZeroPredictor,
)
from tests.everywhere import everywhere, trainer_for
from tests.models import CLASSES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


def train(devices: int, delay: int = 1, epochs: int = 4, **callback: Any) -> Any:
    """Trains in ``devices`` processes; returns the module's state and the metrics of each rank."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=4)
        strategy = "synthetic_gradients" if devices > 1 else "auto"
        trainer = make_trainer(
            strategy=strategy,
            devices=devices,
            max_epochs=epochs,
            callbacks=[SyntheticGradients(delay=delay, **callback)],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        return state_of(module), {k: float(v) for k, v in trainer.callback_metrics.items()}

    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize("delay", [0, pytest.param(1, marks=pytest.mark.smoke), 2])
def test_one_two_and_four_processes_end_with_the_same_weights(delay: int) -> None:
    ((expected, metrics),) = train(1, delay)
    for devices in (2, 4):
        for state, seen in train(devices, delay):
            assert_same_state(expected, state)
            assert seen["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)


def test_a_locked_boundary_is_plain_backpropagation_across_processes() -> None:
    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(1, verbose=False)
        module = Classifier(stages=4)
        trainer_for(devices, [SyntheticGradients(predictor=TrueGradient())], max_epochs=3).fit(module, loader())
        return state_of(module)

    pl.seed_everything(1, verbose=False)
    plain = Classifier(stages=4)
    make_trainer(max_epochs=3).fit(plain, loader())
    for state in everywhere(3, work):
        assert_same_state(state_of(plain), state)


class Manual(Classifier):
    """Manual optimization with a metric object and two backward passes."""

    def __init__(self) -> None:
        super().__init__(stages=4)
        self.automatic_optimization = False
        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self(batch[0])
        self.manual_backward(F.cross_entropy(logits, batch[1]), retain_graph=True)
        self.manual_backward(0.01 * logits.square().mean())
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")
        optimizer.step()
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)


class Accumulating(Classifier):
    """A schedule on every step, parameter groups by name, and weight decay."""

    def configure_optimizers(self) -> Any:
        heads = [parameter for name, parameter in self.named_parameters() if "6" in name]
        others = [parameter for name, parameter in self.named_parameters() if "6" not in name]
        optimizer = torch.optim.AdamW([{"params": heads, "lr": 1e-3}, {"params": others}], lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Flat(pl.LightningModule):
    """No ``Boundary`` modules: it is cut by name, once after a module that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        outputs, _states = self.lstm(x.view(len(x), 3, 4))
        return F.cross_entropy(self.head(torch.relu_(self.mix(outputs).mean(1))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


CASES: dict[str, Any] = {
    "manual": (Manual, {}, {}),
    "accumulation": (Accumulating, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1,
                                    "gradient_clip_algorithm": "value"}, {}),
    "bf16": (Classifier, {"precision": "bf16-mixed"}, {}),
    "direct": (Classifier, {}, {"predictor": MLPPredictor(hidden=8), "training": PredictorTraining(every=3)}),
    "zero": (Classifier, {}, {"predictor": ZeroPredictor()}),
    "gradient_matching": (Classifier, {}, {"predictor": LossModelPredictor(hidden=8, objective="both")}),
    "lstm_by_name": (Flat, {}, {"boundaries": ["lstm", "mix"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_split_equals_one_process(case: str) -> None:
    kind, arguments, callback = CASES[case]

    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = kind()
        trainer_for(devices, [SyntheticGradients(**callback)], max_epochs=3, **arguments).fit(module, loader())
        return state_of(module)

    (expected,) = everywhere(1, work)
    tolerance = 2e-2 if case == "bf16" else 1e-5
    for state in everywhere(2, work):
        for name in expected:
            if not name.startswith("accuracy"):
                torch.testing.assert_close(state[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_by_the_norm_of_the_model_is_as_in_one_process(accumulate: int) -> None:
    def work(devices: int, clip: float = 0.05) -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=4)
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(clip_over="model") if devices > 1 else "auto",
            devices=devices,
            callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))],
            gradient_clip_val=clip,
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(module, loader())
        return state_of(module)

    expected = work(1)
    assert not torch.equal(work(1, clip=0.0)["net.0.0.weight"], expected["net.0.0.weight"])
    for devices in (2, 4):
        for state in run_ranks(devices, lambda devices=devices: work(devices)):
            assert_same_state(expected, state)
