"""Averages of the model that are kept by hand, in mid-epoch, end as in one process, and so do their checkpoints."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_sg import Boundary, SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.models import CLASSES, FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks
from tests.two_stages import Two


class Student(Two):
    """A network with BatchNorm, of which an average is kept in another submodule."""

    def __init__(self) -> None:
        super().__init__()
        del self.first, self.second
        self.fast = nn.ModuleDict({"stem": nn.Linear(FEATURES, 16, bias=False), "norm": nn.BatchNorm1d(16)})
        self.fast["head"] = nn.Linear(16, CLASSES)
        self.cut = Boundary()
        self.keep()

    def keep(self) -> None:
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fast["head"](self.cut(torch.relu(self.fast["norm"](self.fast["stem"](x)))))


class InBatchEnd(Student):
    @torch.no_grad()
    def on_train_batch_end(self, *_arguments: Any) -> None:
        for slow, fast in zip(self.slow.parameters(), self.fast.parameters()):
            slow.lerp_(fast, 0.2)
        for slow, fast in zip(self.slow.buffers(), self.fast.buffers()):
            slow.copy_(fast)


class InZeroGrad(Student):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        for slow, fast in zip(self.slow.parameters(), self.fast.parameters()):
            slow.data.mul_(0.8).add_(fast.data * 0.2)


class ByState(Student):
    def on_train_batch_end(self, *_arguments: Any) -> None:
        fast = self.fast.state_dict()
        mixed = {
            name: value.lerp(fast[name], 0.2) if value.is_floating_point() else value
            for name, value in self.slow.state_dict().items()
        }
        self.slow.load_state_dict(mixed)


class Averaged(Student):
    def keep(self) -> None:
        self.slow = AveragedModel(self.fast, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)

    def on_train_batch_end(self, *_arguments: Any) -> None:
        self.slow.update_parameters(self.fast)


class Shadows(nn.Module):
    """Buffers without dots in their names, as diffusion models keep them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("updates", torch.tensor(0))
        self.names = {name: name.replace(".", "") for name, _parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            self.register_buffer(self.names[name], parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        self.updates += 1
        shadows = dict(self.named_buffers())
        for name, parameter in model.named_parameters():
            shadow = shadows[self.names[name]]
            shadow.sub_(0.2 * (shadow - parameter))


class InBuffers(Student):
    def keep(self) -> None:
        self.slow = Shadows(self.fast)

    def on_train_batch_end(self, *_arguments: Any) -> None:
        self.slow(self.fast)


class InManualStep(Student):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters()):
                slow.lerp_(fast, 0.2)


class InManualHook(InManualStep):
    """Its average is one that could be trained."""

    def keep(self) -> None:
        self.slow = copy.deepcopy(self.fast)

    @torch.no_grad()
    def on_after_backward(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.fast.parameters()):
            slow.data.lerp_(fast.data, 0.1)


class Hidden(Student):
    """A copy that is kept out of the module's own, in a list."""

    def keep(self) -> None:
        self.copies = [copy.deepcopy(self.fast)]

    @torch.no_grad()
    def on_after_backward(self) -> None:
        for slow, fast in zip(self.copies[0].parameters(), self.fast.parameters()):
            slow.lerp_(fast, 0.2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = state_of(self.copies[0])


class OfAll(Student):
    """An average of the whole module, in a list that is not a part of it, saved by hand."""

    def keep(self) -> None:
        self.shadow = [parameter.detach().clone() for parameter in self.fast.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, *_arguments: Any) -> None:
        torch._foreach_lerp_(self.shadow, list(self.fast.parameters()), 0.2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = {str(place): tensor.clone() for place, tensor in enumerate(self.shadow)}


class InACallback(Callback):
    """A dict of tensors, made at the first batch."""

    def __init__(self) -> None:
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_arguments: Any) -> None:
        if not self.shadow:
            self.shadow = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        for name, parameter in pl_module.named_parameters():
            self.shadow[name] = 0.8 * self.shadow[name] + 0.2 * parameter

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = dict(self.shadow)


class Plain(Student):
    def keep(self) -> None:
        pass


class EMA(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(0.5))


KINDS: dict[str, tuple[type[Student], list[type[Callback]]]] = {
    **{
        kind.__name__: (kind, [])
        for kind in (
            *(InBatchEnd, InZeroGrad, ByState, Averaged, InBuffers),
            *(InManualStep, InManualHook, Hidden, OfAll),
        )
    },
    "InACallback": (Plain, [InACallback]),
    "WeightAveraging": (Plain, [EMA]),
}


def train(name: str, devices: int, folder: Path, checkpoint: Path | None = None) -> list[Any]:
    kind, callbacks = KINDS[name]

    def work() -> Any:
        pl.seed_everything(5, verbose=False)
        module = kind()
        added: list[Any] = [callback() for callback in callbacks]
        options: dict[str, Any] = {}
        if devices > 1:
            added.insert(0, SyntheticGradients(predictor=TrueGradient()))
            options["strategy"] = SyntheticGradientStrategy(timeout=20.0)
        trainer = make_trainer(devices=devices, callbacks=added, max_epochs=3 if checkpoint else 2, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader(shuffle=False), loader(shuffle=False), ckpt_path=checkpoint)
        words = [str(warning.message) for warning in caught]
        trainer.save_checkpoint(folder / "end.ckpt")
        return state_of(module), [each for each in words if "in the middle of an epoch" in each.lower()]

    folder.mkdir(exist_ok=True)
    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize("name", list(KINDS))
def test_an_average_is_where_its_original_is(name: str, tmp_path: Path) -> None:
    ((expected, _words),) = train(name, 1, tmp_path / "one")
    for state, words in train(name, 2, tmp_path / "two"):
        assert_same_state(state, expected)
        assert not words
    one, two = (torch.load(tmp_path / which / "end.ckpt", weights_only=False) for which in ("one", "two"))
    assert_same_state(two["state_dict"], one["state_dict"])
    assert_same_state(two.get("average", {}), one.get("average", {}))
    assert_same_state(two.get("current_model_state", {}), one.get("current_model_state", {}))


@pytest.mark.parametrize("name", ["InBatchEnd", "Averaged", "WeightAveraging"])
def test_a_run_that_goes_on_keeps_the_average_there(name: str, tmp_path: Path) -> None:
    train(name, 1, tmp_path / "begun")
    ((expected, _words),) = train(name, 1, tmp_path / "one", tmp_path / "begun" / "end.ckpt")
    for state, words in train(name, 2, tmp_path / "two", tmp_path / "begun" / "end.ckpt"):
        assert_same_state(state, expected)
        assert not words


class Teacher(InBatchEnd):
    """A mean teacher that the last stage uses: it needs the student's first layers, which are in another process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            taught = self.slow["head"](torch.relu(self.slow["norm"](self.slow["stem"](x))))
        return nn.functional.cross_entropy(logits, y) + nn.functional.mse_loss(logits, taught)


def test_an_average_that_another_stage_uses_is_warned_of_by_name() -> None:
    def work() -> list[str]:
        module = Teacher()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(
                devices=2,
                strategy=SyntheticGradientStrategy(timeout=20.0),
                callbacks=[SyntheticGradients(predictor=TrueGradient())],
            ).fit(module, loader())
        return [
            str(warning.message) for warning in caught if "in the middle of an epoch" in str(warning.message).lower()
        ]

    last, _first = run_ranks(2, work)
    (words,) = last
    assert "Teacher.on_train_batch_end uses 'fast." in words
    assert "stage 0 (rank 1)" in words


class InStep(Student):
    """The step itself updates the average, before it runs the network."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters()):
                slow.lerp_(fast, 0.2)
        return super().training_step(batch, batch_idx)


def test_an_average_that_the_step_updates_is_refused_with_what_to_do() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(timeout=20.0)
        make_trainer(devices=2, strategy=strategy, callbacks=[SyntheticGradients()]).fit(InStep(), loader())

    failures = run_ranks(2, work, may_fail=True)
    assert {failure.kind for failure in failures} == {"PartitionError"}
    assert all("to update an average of the weights" in failure.message for failure in failures)
    assert all("in a hook, such as on_train_batch_end" in failure.message for failure in failures)
