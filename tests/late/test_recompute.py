"""Late gradients by another forward pass of each stage, with its newest weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_sg import (
    LateGradients,
    LossModelPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticInputs,
    decouple,
)
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks

RECOMPUTED = LateGradients(0.2, recompute=True)


class Sgd(Classifier):
    rate = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Still(Sgd):
    rate = 0.0


class Noted(Callback):
    """Notes weights before each step, and the gradients that it is made with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor | None]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.weights.append({name: parameter.detach().clone() for name, parameter in named.items()})
        self.gradients.append(
            {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in named.items()}
        )


def noted(module: pl.LightningModule, batches: int = 12, **callback: Any) -> Noted:
    notes = Noted()
    trainer = make_trainer(max_steps=batches, max_epochs=-1, callbacks=[SyntheticGradients(**callback), notes])
    trainer.fit(module, loader(shuffle=False))
    return notes


def test_weights_that_stay_have_the_gradients_of_kept_graphs() -> None:
    def gradients(recompute: bool) -> list[dict[str, Tensor | None]]:
        pl.seed_everything(7, verbose=False)
        return noted(Still(stages=4), late=LateGradients(0.2, recompute=recompute)).gradients

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_late_gradient_is_that_of_the_newest_weights_before_the_boundary_and_of_its_own_after_it() -> None:
    pl.seed_everything(7, verbose=False)
    module = Sgd(stages=2)
    notes = noted(module, late=LateGradients(share=1, recompute=True), delay=1)
    batches = [batch for _ in range(3) for batch in loader(shuffle=False)]
    reference = Sgd(stages=2).train()
    for step in range(2, 12):
        x, y = batches[step - 2]
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                own = name.startswith("net.0.")
                parameter.copy_(notes.weights[step if own else step - 2][name])
            # What crossed the boundary is that of the old weights, and so is the gradient there.
            old = Sgd(stages=2).train()
            for name, parameter in old.named_parameters():
                parameter.copy_(notes.weights[step - 2][name])
            h = old.net[0](x)
        h.requires_grad_()
        F.cross_entropy(reference.net[2:](h), y).backward()
        reference.zero_grad()
        reference.net[0](x).backward(h.grad)
        expected = reference.get_parameter("net.0.0.weight").grad
        found = notes.gradients[step]["net.0.0.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_running_statistics_and_logs_count_each_batch_once() -> None:
    class Counts(Sgd):
        steps = logs = 0

        def log(self, *args: Any, **arguments: Any) -> None:  # type: ignore[override]
            self.logs += 1

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            return super().training_step(batch, batch_idx)

    kept, again = Counts(stages=3), Counts(stages=3)
    again.load_state_dict(kept.state_dict())
    own = {"predictor": LossModelPredictor(objective="loss"), "training": PredictorTraining(seed=1)}
    for module, late in ((kept, LateGradients(0.2)), (again, RECOMPUTED)):
        make_trainer(max_epochs=1, callbacks=[SyntheticGradients(late=late, **own)]).fit(module, loader(shuffle=False))
    assert again.net[0][1].num_batches_tracked == 5
    assert again.steps > kept.steps
    assert again.logs == kept.logs


@pytest.mark.parametrize("devices", [1, 3])
def test_a_resumed_run_goes_on_as_the_one_that_was_saved(devices: int, tmp_path: Path) -> None:
    """In the middle of an epoch, after a validation, so that the model was not in training mode."""

    def work() -> Any:
        def fit(resume: str | None = None) -> Any:
            pl.seed_everything(7, verbose=False)
            module = Sgd(stages=4)
            saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, monitor="val_loss")
            make_trainer(
                strategy="synthetic_gradients" if devices > 1 else "auto",
                devices=devices,
                max_epochs=3,
                enable_checkpointing=True,
                callbacks=[SyntheticGradients(late=RECOMPUTED), saver],
            ).fit(module, loader(shuffle=False), loader(shuffle=False), ckpt_path=resume, weights_only=True)
            return state_of(module)

        whole = fit()
        return whole, fit(str(tmp_path / "step=5.ckpt"))

    results = run_ranks(devices, work) if devices > 1 else [work()]
    for whole, resumed in results:
        assert_same_state(whole, resumed)


def test_what_is_run_again_for_a_checkpoint_is_so_in_one_process_and_in_several(tmp_path: Path) -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(7, verbose=False)
        module = Sgd(stages=4)
        saver = ModelCheckpoint(dirpath=tmp_path / str(devices), every_n_train_steps=3, save_top_k=-1)
        make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            enable_checkpointing=True,
            callbacks=[SyntheticGradients(late=RECOMPUTED), saver],
        ).fit(module, loader(), loader(shuffle=False))
        return state_of(module)

    expected = work(1)
    for devices in (2, 4):
        for state in run_ranks(devices, lambda devices=devices: work(devices)):
            assert_same_state(expected, state)


class ByHand(Sgd):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False


class Twice(Sgd):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.net(x)


def test_steps_that_cannot_run_again_are_refused() -> None:
    for module, error, message in (
        (ByHand(stages=2), SyntheticGradientsError, "would update the weights"),
        (Twice(stages=2), SyntheticGradientsError, "has crossed boundary 'net.1' twice"),
    ):
        with pytest.raises(error, match=message):
            make_trainer(callbacks=[SyntheticGradients(late=RECOMPUTED)]).fit(module, loader())


@pytest.mark.parametrize("other", [{"inputs": SyntheticInputs()}, {"on_non_finite": "skip"}])
def test_options_that_change_what_a_stage_is_given_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="runs batches again as they were given"):
        SyntheticGradients(late=RECOMPUTED, **other)


@pytest.mark.parametrize("late", [LateGradients(0.2), RECOMPUTED])
def test_a_loop_of_your_own_applies_what_the_trainer_applies(late: LateGradients) -> None:
    own = {"predictor": LossModelPredictor(objective="loss"), "training": PredictorTraining(seed=1), "late": late}
    trained, looped = Sgd(stages=3), Sgd(stages=3)
    looped.load_state_dict(trained.state_dict())
    data = loader(shuffle=False)
    make_trainer(max_epochs=2, callbacks=[SyntheticGradients(**own)]).fit(trained, data)
    net = looped.net
    plain = torch.nn.Module()
    plain.net = net  # under the same name, which seeds the predictors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with decouple(plain, ["net.1", "net.3"], **own) as sg:
        for _ in range(2):
            for batch in data:
                optimizer.zero_grad()
                sg.backward(lambda batch: F.cross_entropy(net(batch[0]), batch[1]), batch)
                optimizer.step()
        assert sg.state_dict()["corrections"]
    assert_same_state(state_of(trained), state_of(looped))
