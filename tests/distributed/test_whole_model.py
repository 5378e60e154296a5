"""Hooks at the end of an epoch and around validation see, and may write, the whole current model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sg import Boundary, SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.models import FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks
from tests.two_stages import Two


class Seeing(Two):
    """Two stages with BatchNorm; notes what a hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16, bias=False), nn.BatchNorm1d(16))  # type: ignore[assignment]
        self.cut = Boundary()
        self.seen: list[Any] = []

    def note(self) -> None:
        """Saves what users save: a copy of the state, an output and a norm."""
        training = self.training
        self.eval()
        with torch.no_grad():
            output = self(torch.ones(2, FEATURES, device=self.device)).cpu()
        self.train(training)
        norm = torch.stack([parameter.detach().norm().cpu() for parameter in self.parameters()]).norm()
        self.seen.append(({name: value.cpu() for name, value in state_of(self).items()}, output, norm))


def hooked(name: str) -> type[Seeing]:
    """A module that looks in one of its hooks."""
    return type("Hooked", (Seeing,), {name: lambda self, *_arguments: self.note()})


class Looks(Callback):
    """Looks in a hook of a callback."""

    def __init__(self, name: str) -> None:
        setattr(self, name, lambda _trainer, module, *_arguments: module.note())


def train(
    kind: Callable[[], pl.LightningModule],
    devices: int,
    *callbacks: Callable[[], Callback],
    result: Callable[[Any], Any] = lambda module: module.seen,
    **arguments: Any,
) -> list[Any]:
    """Trains plainly in one process, or with true gradients in two; what each rank's module gives."""

    def work() -> Any:
        pl.seed_everything(3, verbose=False)
        module = kind()
        added = [callback() for callback in callbacks]
        if devices > 1:
            added.insert(0, SyntheticGradients(predictor=TrueGradient()))
            arguments["strategy"] = SyntheticGradientStrategy(timeout=20.0)
        trainer = make_trainer(devices=devices, callbacks=added, **arguments)
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        return result(module)

    return run_ranks(devices, work) if devices > 1 else [work()]


def assert_same_sights(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for (state, output, norm), (state_wanted, output_wanted, norm_wanted) in zip(found, expected):
        assert_same_state(state, state_wanted)
        torch.testing.assert_close(output, output_wanted)
        torch.testing.assert_close(norm, norm_wanted)


HOOKS = ["on_train_epoch_end", "on_train_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_start"]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_the_module_sees_the_whole_current_model(name: str) -> None:
    (expected,) = train(hooked(name), 1)
    for found in train(hooked(name), 2):
        if name in ("on_train_epoch_start",):  # the first of the model is before anything is trained
            found, wanted = found[1:], expected[1:]
        else:
            wanted = expected
        assert_same_sights(found, wanted)


@pytest.mark.parametrize("name", ["on_train_epoch_end", "on_validation_start", "on_validation_batch_end", "on_fit_end"])
def test_a_hook_of_a_callback_sees_the_whole_current_model(name: str) -> None:
    options = {"num_sanity_val_steps": 0, "val_check_interval": 2}
    (expected,) = train(Seeing, 1, lambda: Looks(name), **options)
    for found in train(Seeing, 2, lambda: Looks(name), **options):
        assert_same_sights(found, expected)


def test_a_callback_on_one_rank_sees_it_too() -> None:
    class Some(Seeing):
        def configure_callbacks(self) -> Any:
            return [Looks("on_train_epoch_end")] if self.trainer.is_global_zero else []

    (expected,) = train(Some, 1)
    first, second = train(Some, 2)
    assert_same_sights(first, expected)
    assert second == []


class Pruning(Seeing):
    """Writes to weights of all stages, as pruning and averages do: in place, behind autograd's back, on one rank."""

    everywhere = True

    def on_train_epoch_end(self) -> None:
        if not self.everywhere and not self.trainer.is_global_zero:
            return
        with torch.no_grad():
            self.first[0].weight.mul_(0.5)  # type: ignore[index]
            self.second.weight.data.mul_(0.75)
            self.first[1].bias.data = self.first[1].bias.data + 1  # type: ignore[index]


class PruningOnOne(Pruning):
    everywhere = False


@pytest.mark.parametrize("kind", [Pruning, PruningOnOne])
def test_what_a_hook_writes_reaches_the_stage_that_trains_it(kind: type[Pruning]) -> None:
    (expected,) = train(kind, 1, result=state_of)
    for found in train(kind, 2, result=state_of):
        assert_same_state(found, expected)


def test_without_such_hooks_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sg.distributed import saving

    gathered: list[str] = []
    gather = saving.gather_weights

    def noted(*arguments: Any) -> None:
        gathered.append("weights")
        gather(*arguments)

    monkeypatch.setattr(saving, "gather_weights", noted)
    counts = train(Seeing, 2, result=lambda _module: len(gathered))
    assert counts == [1, 1]  # at the end of the run
    counts = train(hooked("on_train_epoch_end"), 2, result=lambda _module: len(gathered))
    assert counts == [3, 3]


def test_in_a_test_it_is_whole_too(tmp_path: Path) -> None:
    class Tested(hooked("on_test_epoch_end")):  # type: ignore[misc]
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def on_test_epoch_end(self) -> None:
            super().on_test_epoch_end()
            self.seen.append(float(self.trainer.callback_metrics["test_loss"]))

    def work() -> Any:
        module = Tested()  # without a seed, every process has made other weights
        trainer = make_trainer(devices=2, strategy=SyntheticGradientStrategy(timeout=20.0))
        trainer.test(module, loader(shuffle=False), verbose=False)
        return module.seen

    first, second = run_ranks(2, work)
    assert_same_state(first[0][0], second[0][0], exact=True)
    assert first[1] == second[1]


class ByHand(Two):
    """Steps a plateau schedule in a hook, as with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        options: dict[str, Any] = {"factor": 0.5, "patience": 0, "threshold": 0.2}
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, **options)
        return self.optimizer


class InEpochEnd(ByHand):
    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.schedule.step(metrics["train_loss"])
        self.rates.append((float(metrics["train_loss"]), self.optimizer.param_groups[0]["lr"]))


class InValidation(ByHand):
    def on_validation_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.schedule.step(metrics["val_loss"])
        self.rates.append((float(metrics["val_loss"]), self.optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("kind", [InEpochEnd, InValidation])
def test_metrics_are_there_before_the_hooks(kind: type[ByHand]) -> None:
    def result(module: Any) -> Any:
        return module.rates, state_of(module)

    options = {"max_epochs": 4, "num_sanity_val_steps": 0}
    ((rates, state),) = train(kind, 1, result=result, **options)
    assert rates[-1][1] < 0.5
    for found, its_state in train(kind, 2, result=result, **options):
        assert [rate for _metric, rate in found] == [rate for _metric, rate in rates]
        assert [metric for metric, _rate in found] == pytest.approx([metric for metric, _rate in rates], rel=1e-5)
        assert_same_state(its_state, state)
