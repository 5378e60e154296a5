"""Whatever a step changes, the traced one leaves no trace of it: training is what it is in plain Lightning."""

from __future__ import annotations

import copy
import itertools
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_sg import Boundary, SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.models import CLASSES, FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Base(pl.LightningModule):
    """Two stages; subclasses change something in :meth:`before` the forward pass, and say in :meth:`seen` what became
    of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 16), Boundary(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(torch.relu(self.first(x))))

    def before(self, x: Tensor) -> Any:
        """Changes something; may return what is added to the input."""

    def seen(self) -> Any:
        """What every process must find after the training as after a plain one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        added = self.before(x)
        return F.cross_entropy(self(x if added is None else x + added), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Manual(Base):
    """The same with an optimizer that is used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class InNestedContainers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, Any] = {"train": [], "by": {"epoch": [0]}}
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        self.pair = ([], deque(maxlen=9))

    def before(self, x: Tensor) -> None:
        self.history["train"].append(len(x))
        self.history["by"]["epoch"][0] += 1
        self.ordered.move_to_end(next(iter(self.ordered)))
        self.pair[0].append(1)
        self.pair[1].append(2)

    def seen(self) -> Any:
        return self.history, list(self.ordered), self.pair[0], list(self.pair[1])


@dataclass
class Meter:
    total: int = 0
    values: list[int] = field(default_factory=list)


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Schedule:
    """Callable, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1.0 / self.calls


class InObjects(Base):
    def __init__(self) -> None:
        super().__init__()
        self.meter, self.slots, self.names, self.noise = Meter(), Slots(), SimpleNamespace(step=0), Schedule()

    def before(self, x: Tensor) -> Any:
        self.meter.total += len(x)
        self.meter.values.append(len(x))
        self.slots.count += 1
        self.names.step += 1
        return self.noise()

    def seen(self) -> Any:
        return self.meter, self.slots.count, self.names, self.noise.calls


class InTensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(())
        self.kept = {"sum": torch.zeros(FEATURES), "array": np.zeros(3)}
        self.queue = torch.zeros(4, FEATURES)

    def before(self, x: Tensor) -> Any:
        self.count += 1
        self.kept["sum"].add_(x.sum(0))
        self.kept["array"] += 1
        self.queue[int(self.count) % 4] = x[0]
        self.queue[:2].mul_(0.9)
        return self.queue.mean(0)

    def seen(self) -> Any:
        return [each.tolist() for each in (self.count, self.kept["sum"], self.kept["array"], self.queue)]


class InHiddenModules(Base):
    """A teacher in a list, so that it is no submodule, moved by every step."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES))]

    def before(self, x: Tensor) -> Any:
        self.hidden[0].requires_grad_(False)
        for parameter in self.hidden[0].parameters():
            parameter.mul_(0.9)
        return self.hidden[0](x)

    def seen(self) -> Any:
        return {name: tensor.tolist() for name, tensor in self.hidden[0].state_dict().items()}


class InGenerators(Base):
    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.numpy, self.legacy, self.python = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)

    def before(self, x: Tensor) -> Any:
        drawn = self.numpy.random() + self.legacy.rand() + self.python.random()
        return torch.randn(x.shape, generator=self.torch) + drawn

    def seen(self) -> Any:
        return torch.rand(1, generator=self.torch).item(), self.numpy.random(), self.python.random()


class InIterators(Base):
    """Takes batches of its own by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        self.held = {"others": iter(loader(batch_size=4, shuffle=False, samples=400))}
        self.short = iter([1])
        self.unused = iter([7])

    def before(self, x: Tensor) -> Any:
        others, _labels = next(self.held["others"])
        shift = others.mean() + next(self.numbers)
        others.zero_()
        return shift + next(self.short, 0)

    def seen(self) -> Any:
        return next(self.numbers), next(self.held["others"])[0].tolist(), list(self.short), list(self.unused)


class InModes(Base):
    """Changes what torch does, without a context that ends."""

    def before(self, x: Tensor) -> None:
        self.modes.append((torch.is_grad_enabled(), torch.get_default_dtype(), self.second.training))
        torch.set_default_dtype(torch.float64 if len(self.modes) % 2 else torch.float32)
        self.second.train(not self.second.training)
        self.first.bias.requires_grad_(len(self.modes) % 2 == 0)

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.before(batch[0])
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_end(self) -> None:
        torch.set_default_dtype(torch.float32)

    def seen(self) -> Any:
        return self.modes, self.second.training


class Noting(Callback):
    def __init__(self) -> None:
        self.notes: list[int] = []


class InTheTrainer(Base):
    def before(self, x: Tensor) -> None:
        self.trainer.counted = getattr(self.trainer, "counted", 0) + 1
        for callback in self.trainer.callbacks:
            if isinstance(callback, Noting):
                callback.notes.append(len(x))
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9
            group["mine"] = group.get("mine", 0) + 1

    def configure_callbacks(self) -> Any:
        return [Noting()]

    def seen(self) -> Any:
        (notes,) = [each.notes for each in self.trainer.callbacks if isinstance(each, Noting)]
        (group,) = self.trainer.optimizers[0].param_groups
        return self.trainer.counted, notes, group["lr"], group["mine"]


class Steps(Manual):
    """Makes the last batch's optimizer step, and that of the schedule, before this batch's forward pass."""

    def before(self, x: Tensor) -> None:
        self.optimizers().step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def seen(self) -> Any:
        return self.trainer.global_step, self.lr_schedulers().last_epoch, self.optimizers().param_groups[0]["lr"]


class WithClosure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def seen(self) -> Any:
        return self.trainer.global_step


class Toggles(Manual):
    """Ends the trace while all but one layer is frozen."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for place, each in enumerate(optimizer):
            self.toggle_optimizer(each)
            if place == 0:
                loss = F.cross_entropy(self(batch[0]), batch[1])
                each.zero_grad()
                self.manual_backward(loss)
                each.step()
            self.untoggle_optimizer(each)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.first, self.second)]

    def seen(self) -> Any:
        return [parameter.requires_grad for parameter in self.parameters()]


class InPlainMetrics(Base):
    """A metric in a dict: it is no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"mean": MeanMetric()}

    def before(self, x: Tensor) -> None:
        self.metrics["mean"].update(float(len(x)))

    def seen(self) -> Any:
        return self.metrics["mean"].compute().item()


KINDS = [
    InNestedContainers,
    InObjects,
    InTensors,
    InHiddenModules,
    InGenerators,
    InIterators,
    InModes,
    InTheTrainer,
    Steps,
    WithClosure,
    Toggles,
    InPlainMetrics,
]


def train(kind: type[Base], devices: int = 1, *callbacks: Callback) -> tuple[dict[str, Tensor], Any]:
    pl.seed_everything(3, verbose=False)
    module = kind()
    strategy = SyntheticGradientStrategy(timeout=15.0) if devices > 1 else "auto"
    trainer = make_trainer(callbacks=list(callbacks), devices=devices, strategy=strategy)
    trainer.fit(module, loader(shuffle=False))
    return state_of(module), copy.deepcopy(module.seen())


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_is_exactly_plain_training(kind: type[Base], recwarn: pytest.WarningsRecorder) -> None:
    state, seen = train(kind, 1, SyntheticGradients(predictor=TrueGradient()))
    assert not [str(each.message) for each in recwarn if "could not be checked" in str(each.message)]
    expected, plainly_seen = train(kind)
    assert_same_state(state, expected, exact=True)
    assert seen == plainly_seen


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_plain_training(kind: type[Base]) -> None:
    expected, plainly_seen = train(kind)
    for state, seen in run_ranks(2, lambda: train(kind, 2, SyntheticGradients(predictor=TrueGradient()))):
        assert_same_state(state, expected)
        assert seen == plainly_seen


class Recording(Logger):
    """Counts what is logged by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []
        self.experiment = SimpleNamespace(add_scalar=lambda *args: self.lines.append(args))

    name, version = "recording", 0

    def log_hyperparams(self, *_args: Any, **_kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append(dict(metrics))


class LogsByHand(Base):
    def before(self, x: Tensor) -> None:
        self.logger.experiment.add_scalar("size", len(x), self.global_step)
        self.logger.log_metrics({"mine": 1.0})
        self.print("a step")


def test_loggers_hear_nothing_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Recording()
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(
        callbacks=[SyntheticGradients(predictor=TrueGradient())], logger=logger, max_steps=3, log_every_n_steps=100
    )
    trainer.fit(LogsByHand(), loader(shuffle=False))
    by_hand = [line for line in logger.lines if isinstance(line, tuple) or "mine" in line]
    assert len(by_hand) == 6
    assert capsys.readouterr().out.count("a step") == 3
