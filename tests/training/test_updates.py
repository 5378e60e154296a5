"""Stages that are updated at random times: which, when, and alike in one process and in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_sg import (
    Boundary,
    DelayedGradient,
    ExactGradients,
    LossModelPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticGradientStrategy,
    SyntheticInputs,
)
from lightning_sg.partition.fakes import is_fake
from lightning_sg.predictors.base import Gradients
from lightning_sg.training.updates import RandomUpdates
from tests.models import (
    CLASSES,
    FEATURES,
    Classifier,
    assert_same_state,
    fit_and_save,
    loader,
    make_trainer,
    state_of,
)
from tests.ranks import DEVICE, run_ranks


class Watcher(Callback):
    """Notes at each optimizer step which stages were to be updated, and which parameters and states changed."""

    def __init__(self, callback: SyntheticGradients) -> None:
        self.callback = callback
        self.steps: list[tuple[list[bool], set[str], set[str]]] = []
        self._before: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}

    def _moments_of(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        state = trainer.optimizers[0].state
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {names[id(p)]: torch.stack([v.clone().sum() for v in s.values()]) for p, s in state.items()}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._number = trainer.global_step
        self._before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self._moments = self._moments_of(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._number:
            return  # accumulated
        updates = self.callback.session.updates
        moments = self._moments_of(trainer, pl_module)
        changed = {n for n, p in pl_module.named_parameters() if not torch.equal(p, self._before[n])}
        stepped = {n for n, m in moments.items() if n not in self._moments or not torch.equal(m, self._moments[n])}
        self.steps.append(([updates.updates(stage) for stage in range(4)], changed, stepped))


def stage_of(name: str) -> int:
    """Of a parameter of a Classifier with four stages; the last has its block and its output layer."""
    return min(int(name.split(".")[1]) // 2, 3)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_skipped_stages_keep_their_weights_and_their_optimizers_state(accumulate: int) -> None:
    pl.seed_everything(3, verbose=False)
    module = Classifier(stages=4)
    callback = SyntheticGradients(training=PredictorTraining(update_probability=0.5, seed=5))
    watcher = Watcher(callback)
    make_trainer(callbacks=[callback, watcher], accumulate_grad_batches=accumulate, max_epochs=6).fit(module, loader())
    assert len(watcher.steps) == 6 * {1: 5, 3: 2}[accumulate]
    for number, (updated, changed, stepped) in enumerate(watcher.steps):
        for name, _parameter in module.named_parameters():
            if not updated[stage_of(name)]:
                assert name not in changed | stepped
            elif number > 12:  # before, predictors may not have begun to predict
                assert name in changed & stepped
    shares = [sum(updated) for updated, _changed, _stepped in watcher.steps]
    assert 0 < sum(shares) < 4 * len(shares)


def test_predictors_learn_only_on_batches_with_which_their_stage_is_updated() -> None:
    seen: list[Tensor] = []  # what crossed the first boundary, by batch
    learned: list[int] = []

    class Counting(LossModelPredictor):
        def forward_and_backward(self, activations: Gradients, context: Any) -> tuple[Gradients, Tensor]:
            learned.extend(number for number, tensor in enumerate(seen) if torch.equal(tensor, activations[0]))
            return super().forward_and_backward(activations, context)

    pl.seed_everything(3, verbose=False)
    module = Classifier(stages=4)
    module.net[0].register_forward_hook(
        lambda _module, _args, output: None if is_fake(output) else seen.append(output.detach().clone())
    )
    predictors = {"net.1": Counting(), "net.3": LossModelPredictor(), "net.5": LossModelPredictor()}
    callback = SyntheticGradients(predictor=predictors, training=PredictorTraining(update_probability=0.5, seed=5))
    make_trainer(callbacks=[callback], max_epochs=4).fit(module, loader())
    updates = RandomUpdates(0.5)
    updates.start(5)
    updated = []
    for number in range(20):
        updates.begin(number)
        updated.append(updates.updates(0))
    assert learned == [number for number in range(20) if updated[number]]


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_probability_one_is_the_plain_run_bit_for_bit(arguments: dict[str, Any]) -> None:
    states = []
    for options in ({}, {"training": PredictorTraining(update_probability=1.0)}):
        pl.seed_everything(3, verbose=False)
        module = Classifier()
        make_trainer(callbacks=[SyntheticGradients(**options)], **arguments).fit(module, loader())
        states.append(state_of(module))
    assert_same_state(*states, exact=True)


def test_the_share_of_updates_is_the_probability_and_stages_differ() -> None:
    updates = RandomUpdates(0.2)
    updates.start(7)
    drawn = []
    for number in range(2000):
        updates.begin(number)
        drawn.append([updates.updates(stage) for stage in range(3)])
    shares = torch.tensor(drawn).float()
    assert ((shares.mean(0) - 0.2).abs() < 0.03).all()
    together = shares[:, 0] * shares[:, 1]
    assert abs(float(together.mean()) - 0.04) < 0.015  # independent of each other


def test_a_parameter_of_several_stages_follows_the_first() -> None:
    module = nn.ModuleDict({"tied": nn.Linear(2, 2), "own": nn.Linear(2, 2), "unseen": nn.Linear(2, 2)})
    uses = {"tied.weight": {0, 2}, "tied.bias": {2}, "own.weight": {1}, "own.bias": {1}}
    updates = RandomUpdates(0.5)
    updates.start(1)
    updates.accept(["a", "b"], uses, 2)
    seen = set()
    for number in range(30):
        updates.begin(number)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        updates.drop(module)
        kept = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        first, middle, last = (updates.updates(stage) for stage in range(3))
        assert ("tied.weight" in kept, "own.bias" in kept, "unseen.bias" in kept) == (first, middle, last)
        assert ("tied.bias" in kept) == last
        seen.add((first, middle, last))
    assert len(seen) == 8


class Manual(Classifier):
    """Optimizes by hand."""

    def __init__(self, stages: int = 4) -> None:
        super().__init__(stages)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def train(
    devices: int,
    kind: type[Classifier] = Classifier,
    trainer: Mapping[str, Any] = MappingProxyType({}),
    **callback: Any,
) -> Any:
    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = kind(stages=4)
        fitted = make_trainer(
            strategy=SyntheticGradientStrategy(clip_over="model") if devices > 1 else "auto",
            devices=devices,
            max_epochs=4,
            callbacks=[SyntheticGradients(training=PredictorTraining(update_probability=0.5), **callback)],
            **trainer,
        )
        fitted.fit(module, loader(), loader(shuffle=False))
        return state_of(module)

    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainer": {"accumulate_grad_batches": 2}},
        {"trainer": {"gradient_clip_val": 0.05}},
        {"kind": Manual, "inputs": SyntheticInputs()},
        {"inputs": SyntheticInputs(), "delay": 0, "exact": ExactGradients(every=2)},
    ],
)
def test_several_processes_make_the_same_choices_as_one(options: dict[str, Any]) -> None:
    (expected,) = train(1, **options)
    for devices in (2, 4):
        for state in train(devices, **options):
            assert_same_state(expected, state)


def test_by_hand_and_by_lightning_the_same_stages_are_updated() -> None:
    assert_same_state(train(1)[0], train(1, kind=Manual)[0], exact=True)


def test_a_gradient_scaler_bears_steps_without_any_gradient() -> None:
    pl.seed_everything(3, verbose=False)
    module = Classifier(stages=2)
    callback = SyntheticGradients(training=PredictorTraining(update_probability=0.3, seed=5))
    watcher = Watcher(callback)
    scaling = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=2.0**10))
    make_trainer(callbacks=[callback, watcher], plugins=[scaling], max_epochs=8).fit(module, loader())
    later = watcher.steps[12:]  # before, the predictor may not have begun to predict
    changed = [bool(changed) for _updated, changed, _stepped in later]
    assert changed == [any(updated[:2]) for updated, _changed, _stepped in later]
    assert set(changed) == {True, False}


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None, torch_seed: int) -> dict[str, Tensor]:
        pl.seed_everything(torch_seed, verbose=False)
        module = Classifier()
        callback = SyntheticGradients(training=PredictorTraining(update_probability=0.5), inputs=SyntheticInputs())
        fit_and_save(module, callback, 1, tmp_path, None if checkpoint is None else str(checkpoint), epochs)
        return state_of(module)

    whole = fit(4, None, 3)
    fit(2, None, 3)
    # The choices go on as the saved run's seed has them, whatever torch's seed is now.
    assert_same_state(whole, fit(4, tmp_path / "last.ckpt", 11), exact=True)


class ReadsValues(pl.LightningModule):
    """Cannot be followed without data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 8), Boundary(), nn.Linear(8, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(batch[0])
        hidden = hidden / max(1.0, hidden.abs().max().item())
        return F.cross_entropy(self.second(self.cut(hidden)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_step_that_cannot_be_followed_is_refused() -> None:
    trainer = make_trainer(callbacks=[SyntheticGradients(training=PredictorTraining(update_probability=0.5))])
    with (
        pytest.warns(UserWarning, match="could not be checked"),
        pytest.raises(SyntheticGradientsError, match="update_probability=1 with this model"),
    ):
        trainer.fit(ReadsValues(), loader())


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5])
def test_a_probability_that_is_none_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="update_probability must be a finite number above 0 and at most 1"):
        SyntheticGradients(training=PredictorTraining(update_probability=probability))


def test_corrections_are_refused() -> None:
    with pytest.raises(ValueError, match="Use correction=0"):
        SyntheticGradients(training=PredictorTraining(update_probability=0.5), exact=ExactGradients(correction=1.0))
    trainer = make_trainer(
        callbacks=[SyntheticGradients(training=PredictorTraining(update_probability=0.5), predictor=DelayedGradient())]
    )
    with pytest.raises(SyntheticGradientsError, match="does not go with DelayedGradient"):
        trainer.fit(Classifier(), loader())
