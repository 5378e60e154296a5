"""Collectives in the user's code: metrics outside the module, gathering, saving; none waits for what does not come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, ModelPruning
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.models import CLASSES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import Failure, run_ranks
from tests.two_stages import Two, fit


class Scored(Two):
    """Keeps metrics in a dict, which is no submodule."""

    guarded = True

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"accuracy": MulticlassAccuracy(CLASSES), "auroc": MulticlassAUROC(CLASSES)}
        self.results: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        for metric in self.metrics.values():
            metric.update(logits, batch[1])
        return logits

    def on_validation_epoch_end(self) -> None:
        if self.trainer.is_global_zero or not self.guarded:
            self.results.append({name: float(metric.compute()) for name, metric in self.metrics.items()})
            for metric in self.metrics.values():
                metric.reset()


class Unguarded(Scored):
    guarded = False


class InACallback(Callback):
    def __init__(self, *, guarded: bool) -> None:
        self.mean, self.scores, self.guarded = MeanMetric(), MulticlassAUROC(CLASSES), guarded
        self.results: list[float] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
        if outputs is not None:
            self.mean.update(outputs.detach().mean())
            self.scores.update(outputs, batch[1])

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero or not self.guarded:
            self.results += [float(self.scores.compute()), float(self.mean.compute())]


def train(kind: type[Two], devices: int, callback: Callback | None = None) -> list[Any]:
    def work() -> Any:
        torch.manual_seed(1)
        module = kind()
        options: dict[str, Any] = {"callbacks": [] if callback is None else [callback]}
        if devices > 1:
            options["strategy"] = SyntheticGradientStrategy(timeout=15.0)
            options["callbacks"].insert(0, SyntheticGradients(predictor=TrueGradient()))
        make_trainer(devices=devices, num_sanity_val_steps=0, **options).fit(
            module, loader(shuffle=False), loader(shuffle=False)
        )
        return callback.results if isinstance(callback, InACallback) else module.results  # type: ignore[attr-defined]

    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize("kind", [Scored, Unguarded])
def test_a_metric_that_is_no_submodule(kind: type[Two]) -> None:
    (expected,) = train(kind, 1)
    assert len(expected) == 2
    last, first = train(kind, 2)
    assert last == expected
    assert first == []


@pytest.mark.parametrize("guarded", [True, False])
def test_a_metric_in_a_callback(guarded: bool) -> None:
    (expected,) = train(Scored, 1, InACallback(guarded=guarded))
    last, first = train(Scored, 2, InACallback(guarded=guarded))
    assert last == pytest.approx(expected, rel=1e-5)
    assert first == []


def test_metrics_have_their_own_ways_again_after_a_run() -> None:
    before = Metric.sync

    def work() -> bool:
        make_trainer(devices=2, strategy="synthetic_gradients", max_steps=1).fit(Two(), loader())
        return Metric.sync is before

    assert run_ranks(2, work) == [True, True]


class Gathers(Two):
    """Gathers in the loss and in a hook, as contrastive losses do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.all_gather(self(batch[0]), sync_grads=True)
        loss = F.cross_entropy(logits, self.all_gather(batch[1]))
        self.log("loss", self.all_gather(loss.detach()).mean())
        return loss

    def on_train_batch_end(self, *_arguments: Any) -> None:
        assert self.all_gather(torch.ones(3)).shape == (3,)


def test_gathering_in_the_loss_is_as_in_one_process() -> None:
    expected = fit(Gathers, callback={"predictor": TrueGradient()})
    for found in fit(Gathers, 2, callback={"predictor": TrueGradient()}):
        assert not isinstance(found, Failure), found.message
        assert_same_state(found, expected)


class GathersFirst(Two):
    """Gathers an activation before the boundary."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.all_gather(torch.relu(self.first(x)), sync_grads=True)))


def test_gathering_before_the_boundary() -> None:
    expected = fit(GathersFirst, callback={"predictor": TrueGradient()})
    for found in fit(GathersFirst, 2, callback={"predictor": TrueGradient()}):
        assert not isinstance(found, Failure), found.message
        assert_same_state(found, expected)


@pytest.mark.parametrize("replicas", [2])
def test_gathering_over_replicas(replicas: int) -> None:
    class Contrastive(Two):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.all_gather(self(batch[0]), sync_grads=True)
            assert logits.shape[0] == replicas
            return F.cross_entropy(logits.flatten(0, 1), self.all_gather(batch[1]).flatten())

    def work() -> Any:
        module = Contrastive()
        make_trainer(devices=4, strategy=SyntheticGradientStrategy(timeout=15.0, replicas=replicas)).fit(
            module, loader(shuffle=False, samples=64)
        )
        return state_of(module)

    first, *others = run_ranks(4, work, may_fail=True)
    assert not isinstance(first, Failure), first.trace
    for other in others:
        assert_same_state(other, first, exact=True)


def test_the_batch_size_finder_is_refused_by_name() -> None:
    for result in fit(Two, 2, callbacks=[BatchSizeFinder()]):
        assert "BatchSizeFinder (and Tuner.scale_batch_size) tries batches" in result.message


def test_the_tuner_is_refused_by_name() -> None:
    class Sized(Two):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return loader(self.batch_size)

    def work() -> None:
        trainer = make_trainer(devices=2, strategy=SyntheticGradientStrategy(timeout=15.0))
        Tuner(trainer).scale_batch_size(Sized(), max_trials=2)

    for result in run_ranks(2, work, may_fail=True):
        assert "BatchSizeFinder (and Tuner.scale_batch_size)" in result.message


def test_pruning_is_refused_by_name() -> None:
    for result in fit(Two, 2, callbacks=[ModelPruning("l1_unstructured", amount=0.5)]):
        assert "ModelPruning puts other parameters into the model" in result.message


class SavesAlone(Callback):
    def __init__(self, hook: str, path: Path) -> None:
        self._path = path
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, *_arguments: Any) -> None:
        if trainer.is_global_zero:
            trainer.save_checkpoint(self._path)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"])
def test_saving_on_one_rank_is_an_error_that_says_so(hook: str, tmp_path: Path) -> None:
    def work() -> None:
        make_trainer(
            devices=2,
            strategy=SyntheticGradientStrategy(timeout=4.0),
            callbacks=[SavesAlone(hook, tmp_path / "alone.ckpt")],
        ).fit(Two(), loader())
        time.sleep(6)

    _assert_said(run_ranks(2, work, may_fail=True))


def test_saving_on_one_rank_after_the_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    def work() -> None:
        trainer = make_trainer(devices=2, strategy=SyntheticGradientStrategy(timeout=4.0))
        trainer.fit(Two(), loader())
        if trainer.is_global_zero:
            trainer.save_checkpoint(tmp_path / "alone.ckpt")
        else:
            time.sleep(6)

    _assert_said(run_ranks(2, work, may_fail=True)[:1])


def _assert_said(results: list[Any]) -> None:
    failures = [result for result in results if isinstance(result, Failure)]
    assert failures
    assert any("`trainer.save_checkpoint`" in failure.message for failure in failures), failures
    for failure in failures:
        assert failure.kind != "Timeout"
