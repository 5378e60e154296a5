"""What the comparisons with plain backpropagation train: tasks, with how they are cut, and methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

import lightning_sg
from examples.colour_digits import ColourDigits
from examples.hard_mnist import HardMnist
from examples.mnist import Mnist, MnistMLP
from examples.mnist_cnn import MnistCNN
from examples.python_reference import BYTES, PythonReference
from examples.regression import Housing, RegressionMLP
from examples.residual_cnn import ResidualCNN
from examples.shakespeare import CharTransformer, Shakespeare
from lightning_sg import ExactGradients, LateGradients, PredictorTraining

# Of 1e-3 and 3e-3 the one at which plain backpropagation has the better validation metric, on most of these tasks.
RATE = 3e-3

BACKPROPAGATION = "backpropagation"
WHOLE = "whole"  # the split of plain backpropagation, which has no boundary
AUTO = "auto"  # the split that the package chooses for the processes

# How hard HardMnist is made: plain backpropagation then errs 5 to 10 % with the MLP, and about 5 % with the CNN.
MLP_DIFFICULTY, CNN_DIFFICULTY = 1.0, 1.3


@dataclass(frozen=True)
class Metric:
    """How good a trained network is.

    Attributes:
        key: What the model logs when it has been trained, in the test if it has one.
        watched: What it logs in validation: for the curve, and to choose a learning rate by.
        title: What the table calls it.
        decimals: How many to print.
        better: Which values are.
        relative: Whether bars are percent of what backpropagation reaches, and not differences.
    """

    key: str
    watched: str
    title: str
    decimals: int
    better: Literal["lower", "higher"] = "lower"
    relative: bool = False

    def behind(self, value: float, base: float) -> float:
        """How much worse ``value`` is than ``base``, positive if worse."""
        worse = value - base if self.better == "lower" else base - value
        return 100 * worse / abs(base) if self.relative else worse


@dataclass(frozen=True)
class Split:
    """One way to cut a task's model.

    Attributes:
        model: Arguments of the model that cut it so.
        bar: How far decoupled training may be behind backpropagation; ``None`` if that is not asked.
        boundaries: Those of ``SyntheticGradients``; ``None`` for those that the model has.
    """

    model: dict[str, Any]
    bar: float | None = None
    boundaries: Literal["auto"] | None = None


@dataclass(frozen=True)
class Task:
    """A model, its data, and for how long it is trained.

    Attributes:
        model: Makes the model from ``learning_rate`` and a split's arguments.
        data: Makes the data from the folder that holds them and a seed.
        epochs: How long.
        splits: By name; :data:`WHOLE` has no boundary, :data:`AUTO` those that the package chooses.
        halves: The name of the split into two stages, for two processes.
        metric: What counts.
        folder: Which data it needs: the name of a command line option, or ``None`` if it makes its own.
        learning_rate: The rate unless others are asked for.
    """

    model: Callable[..., pl.LightningModule]
    data: Callable[[Path | None, int], pl.LightningDataModule]
    epochs: int
    splits: dict[str, Split]
    halves: str
    metric: Metric
    folder: Literal["mnist", "shakespeare"] | None
    learning_rate: float = 1e-3

    @property
    def judged(self) -> list[str]:
        """The names of the splits that have a bar."""
        return [name for name, split in self.splits.items() if split.bar is not None]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        predictor: The name of the predictor's class in ``lightning_sg``, or ``None`` for the package's default.
        arguments: The predictor's.
        callback_arguments: Those of ``SyntheticGradients``.
        whole: Whether it is plain backpropagation, through a network without boundaries.
        optimizer: The model's: the task's own, or see :func:`train_with`.
        batch: How many times as large its batches are as those of the other methods.
    """

    predictor: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    callback_arguments: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    optimizer: Literal["own", "NAdam", "SGD"] = "own"
    batch: int = 1

    def prepare(self, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        """Changes what differs from the task's own: the model's optimizer, the size of batches."""
        if self.optimizer != "own":
            train_with(self.optimizer, module)
        data.batch_size *= self.batch  # type: ignore[attr-defined]

    def callback(self, split: Split) -> lightning_sg.SyntheticGradients:
        """Makes the callback."""
        predictor = "auto" if self.predictor is None else getattr(lightning_sg, self.predictor)(**self.arguments)
        return lightning_sg.SyntheticGradients(
            predictor=predictor, boundaries=split.boundaries, **self.callback_arguments
        )


def train_with(name: Literal["NAdam", "SGD"], module: pl.LightningModule) -> None:
    """Has a model train with an optimizer other than its own, at its own rate, which falls to zero along a cosine.

    Args:
        name: ``"NAdam"``, which suits gradients that come late, or ``"SGD"``, without momentum.
        module: The model.
    """

    def configure() -> Any:
        rate, decay = module.learning_rate, getattr(module, "weight_decay", 0.0)
        optimizer: Optimizer
        if name == "NAdam":
            settings: dict[str, Any] = {"betas": (0.95, 0.999), "decoupled_weight_decay": True}
            optimizer = torch.optim.NAdam(module.parameters(), rate, weight_decay=decay, **settings)  # type: ignore[arg-type]
        else:
            optimizer = torch.optim.SGD(module.parameters(), rate, weight_decay=decay)  # type: ignore[arg-type]
        steps = int(module.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module.configure_optimizers = configure  # type: ignore[method-assign]


_BOOTSTRAPPED = {"exact": ExactGradients(every=0, bootstrap=True)}

METHODS: dict[str, Method | None] = {
    BACKPROPAGATION: None,
    "synthetic gradients": Method(),
    "synthetic gradients, corrected": Method(callback_arguments={"exact": ExactGradients(every=1, correction=1.0)}),
    # As in Jaderberg et al. 2017: from bootstrapped targets.
    "DNI linear": Method("LinearPredictor", {"conditional": False}, _BOOTSTRAPPED),
    "DNI MLP": Method("MLPPredictor", {"conditional": False}, _BOOTSTRAPPED),
    "cDNI linear": Method("LinearPredictor", {}, _BOOTSTRAPPED),
    "cDNI MLP": Method("MLPPredictor", {}, _BOOTSTRAPPED),
    "detach": Method("ZeroPredictor"),
    "local loss": Method("LocalLoss"),
    "delayed gradient": Method("DelayedGradient"),
    "delayed gradient, delay 0": Method("DelayedGradient", callback_arguments={"delay": 0}),
    "feedback alignment": Method("FeedbackAlignment"),
}


def _changed(**options: Any) -> Method:
    """The default with other options of the head."""
    return Method("AutoPredictor", {"options": options})


def _adamw(**settings: float) -> Method:
    """The default with other settings of the predictors' optimizer."""

    def optimizer(parameters: Iterable[Tensor]) -> Optimizer:
        return torch.optim.AdamW(parameters, fused=True, **settings)

    return Method(callback_arguments={"training": PredictorTraining(optimizer=optimizer)})


#: The default with one thing changed: what each part of it is worth. Not trained unless asked for.
ABLATIONS: dict[str, Method] = {
    "head with LayerNorm": _changed(head=lightning_sg.HeadOptions(hidden_norm="layer")),
    "head without normalisation": _changed(head=lightning_sg.HeadOptions(hidden_norm="none")),
    "linear head": _changed(layers=0),
    "head of two layers": _changed(layers=2),
    "head of 256": _changed(hidden=256),
    "own loss only": _changed(objective="loss"),
    "gradient only": _changed(objective="gradient"),
    "own loss and 5 × gradient matching": _changed(
        objective="both", matching=lightning_sg.Matching(weight=5.0, between=False)
    ),
    "no weight decay": _adamw(lr=3e-3, weight_decay=0.0),
    "learning rate 1e-3": _adamw(lr=1e-3, weight_decay=0.3),
    "exact targets on every batch": Method(callback_arguments={"exact": ExactGradients(every=1)}),
    "exact targets on every 8th batch": Method(callback_arguments={"exact": ExactGradients(every=8)}),
    "exact targets on every 16th batch": Method(callback_arguments={"exact": ExactGradients(every=16)}),
    "bootstrapped targets on every batch": Method(callback_arguments=_BOOTSTRAPPED),
    "delay 0": Method(callback_arguments={"delay": 0}),
    "delay 4": Method(callback_arguments={"delay": 4}),
}


def _unlocked(probability: float) -> Method:
    """Nothing waits for anything: gradients and inputs are predicted, and stages updated at random times."""
    inputs = lightning_sg.SyntheticInputs()
    return Method(callback_arguments={"inputs": inputs, "training": PredictorTraining(update_probability=probability)})


#: Without a backward or a forward lock, by the probability of an update. Trained by ``benchmarks.unlocked``.
UNLOCKED: dict[str, Method] = {
    "synthetic gradients and inputs": _unlocked(1.0),
    "synthetic gradients and inputs, p = 0.2": _unlocked(0.2),
    "synthetic gradients and inputs, p = 0.05": _unlocked(0.05),
}


def _late(
    share: float = 0.5, *, every: int = 1, optimizer: Literal["own", "NAdam"] = "NAdam", **callback: Any
) -> Method:
    """A share that stays as it is, whatever the age of gradients and the rate."""
    late = LateGradients(share, every, adapts=False)
    return Method(callback_arguments={"late": late, **callback}, optimizer=optimizer)


def _mixture(*, every: int = 1, optimizer: Literal["own", "NAdam", "SGD"] = "NAdam", **callback: Any) -> Method:
    """The package's own share, which adapts."""
    return Method(callback_arguments={"late": LateGradients(every=every), **callback}, optimizer=optimizer)


#: Late true gradients, alone and in mixtures, and what they have to be compared with. Not trained unless asked for.
LATE: dict[str, Method] = {
    "backpropagation, NAdam": Method(whole=True, optimizer="NAdam"),
    "backpropagation, twice the batch": Method(whole=True, batch=2),
    "backpropagation, NAdam, twice the batch": Method(whole=True, optimizer="NAdam", batch=2),
    "synthetic gradients, NAdam": Method(optimizer="NAdam"),
    "local loss, NAdam": Method("LocalLoss", optimizer="NAdam"),
    "half late": _late(optimizer="own"),
    "half late, NAdam": _late(),
    "half late, NAdam, delay 0": _late(delay=0),
    "half late, NAdam, delay 2": _late(delay=2),
    "half late, NAdam, delay 5": _late(delay=5),
    "half late, NAdam, delay 11": _late(delay=11),
    "half late, NAdam, every 2nd": _late(every=2),
    "half late, NAdam, every 4th": _late(every=4),
    "half late, NAdam, unbound": _late(training=PredictorTraining(bound=1e9)),
    "half late, NAdam, unbound, delay 0": _late(delay=0, training=PredictorTraining(bound=1e9)),
    "half late, every 4th": _late(every=4, optimizer="own"),
    "0.2 late": _late(0.2, optimizer="own"),
    "0.2 late, NAdam": _late(0.2),
    "0.2 late, NAdam, delay 0": _late(0.2, delay=0),
    "0.2 late, NAdam, delay 2": _late(0.2, delay=2),
    "0.2 late, NAdam, delay 5": _late(0.2, delay=5),
    "0.2 late, NAdam, delay 11": _late(0.2, delay=11),
    "mixture": _mixture(optimizer="own"),
    "mixture, delay 0": _mixture(optimizer="own", delay=0),
    "mixture, NAdam": _mixture(),
    "mixture, NAdam, delay 0": _mixture(delay=0),
    "mixture, NAdam, every 2nd": _mixture(every=2),
    "0.2 late, NAdam, unbound": _late(0.2, training=PredictorTraining(bound=1e9)),
    "0.8 late, NAdam": _late(0.8),
    "half late, NAdam, local loss": Method(
        "LocalLoss", callback_arguments={"late": LateGradients(0.5, adapts=False)}, optimizer="NAdam"
    ),
    "late alone": _late(1, optimizer="own"),
    "late alone, NAdam": _late(1),
    "late alone, NAdam, delay 0": _late(1, delay=0),
    "late alone, NAdam, delay 2": _late(1, delay=2),
    "late alone, NAdam, delay 5": _late(1, delay=5),
    "late alone, NAdam, delay 11": _late(1, delay=11),
    "backpropagation, SGD": Method(whole=True, optimizer="SGD"),
    "synthetic gradients, SGD": Method(optimizer="SGD"),
    "local loss, SGD": Method("LocalLoss", optimizer="SGD"),
    "mixture, SGD": _mixture(optimizer="SGD"),
}

ALL_METHODS: dict[str, Method | None] = METHODS | ABLATIONS | UNLOCKED | LATE
#: Those that do not see the boundaries: one run serves all splits.
UNCUT = [name for name, method in ALL_METHODS.items() if method is None or method.whole]

_ERROR = Metric("test_error", "val_error", "test error, %", 2)
_NATS = Metric("val_loss", "val_loss", "nats a character", 4)
_SQUARED_ERROR = Metric("test_loss", "val_loss", "squared error", 4, relative=True)


def _cuts(**bars: float) -> dict[str, Split]:
    return {
        WHOLE: Split({"cuts": "none"}),
        AUTO: Split({"cuts": "none"}, boundaries="auto"),
        **{cuts: Split({"cuts": cuts}, bars.get(cuts)) for cuts in ("every", "four", "middle")},
    }


def _stages(bars: dict[int, float | None]) -> dict[str, Split]:
    return {
        WHOLE: Split({"stages": 1}),
        AUTO: Split({"stages": 1}, boundaries="auto"),
        **{f"{count} stages": Split({"stages": count}, bar) for count, bar in bars.items()},
    }


def _mlp(hidden_layers: int, **options: Any) -> Callable[..., pl.LightningModule]:
    return partial(MnistMLP, hidden_layers=hidden_layers, **options)


def _mnist(model: Callable[..., pl.LightningModule]) -> Task:
    return Task(model, lambda root, seed: Mnist(str(root)), 3, _cuts(every=0.1), "middle", _ERROR, "mnist", RATE)


def _hard_mnist(model: Callable[..., pl.LightningModule], difficulty: float, **bars: float) -> Task:
    return Task(
        model,
        lambda root, seed: HardMnist(str(root), difficulty=difficulty),
        3,
        _cuts(**bars),
        "middle",
        _ERROR,
        "mnist",
        RATE,
    )


def _characters(steps: int, context: int = 64, **model: int) -> Task:
    return Task(
        partial(CharTransformer, context=context, **model),
        lambda root, seed: Shakespeare(str(root), steps=steps, context=context, seed=seed),
        1,
        _stages({2: 0.02, 4: 0.04}),
        "2 stages",
        _NATS,
        "shakespeare",
    )


TASKS: dict[str, Task] = {
    **{f"mnist-mlp-{layers}": _mnist(_mlp(layers)) for layers in (3, 4, 5, 6, 12)},
    "mnist-cnn": _mnist(MnistCNN),
    "hard-mlp-6": _hard_mnist(_mlp(6), MLP_DIFFICULTY, every=0.3, four=0.3),
    # With eight boundaries, for how training bears large rates, another optimizer, and no normalisation.
    "hard-mlp-8": _hard_mnist(_mlp(8), MLP_DIFFICULTY, every=0.3),
    "hard-mlp-8-plain": _hard_mnist(_mlp(8, normalised=False), MLP_DIFFICULTY, every=0.3),
    "hard-cnn": _hard_mnist(MnistCNN, CNN_DIFFICULTY, every=0.3),  # after every layer makes four stages
    "char-800": _characters(800),
    "char-2400": _characters(2400),
    "char-small": _characters(1500, context=32, width=64),
    "char-small-4500": _characters(4500, context=32, width=64),
    "bytes": Task(
        partial(CharTransformer, blocks=8, width=64, context=32, characters=BYTES),
        lambda root, seed: PythonReference(steps=1500, context=32, seed=seed),
        1,
        _stages({4: 0.02, 8: 0.02}) | {"2 stages": Split({"stages": 2})},
        "2 stages",
        replace(_NATS, title="nats a byte"),
        None,
    ),
    "colour-cnn": Task(
        ResidualCNN, lambda root, seed: ColourDigits(), 4, _stages({2: 0.3, 4: 0.3}), "2 stages", _ERROR, None, RATE
    ),
    "regression": Task(
        RegressionMLP,
        lambda root, seed: Housing(),
        20,
        _stages({2: None, 3: 1.0}),
        "2 stages",
        _SQUARED_ERROR,
        None,
        RATE,
    ),
}
