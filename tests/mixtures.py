"""Mixes Lightning's two packages in every way; started as a program, which prints what became of each mixture as JSON.

    python -m tests.mixtures FIRST [SECOND]

imports these modules in this order, one of which may be lightning_sg, before both packages.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

for name in sys.argv[1:]:
    importlib.import_module(name)
packages = {name: importlib.import_module(name) for name in ("lightning.pytorch", "pytorch_lightning")}

import lightning_sg  # noqa: E402
from lightning_sg.which_lightning import CHOICE, TRAINING  # noqa: E402

ours: Any = packages[TRAINING[CHOICE.package]]
other: Any = packages[TRAINING[CHOICE.other]]


def module(package: Any) -> Any:
    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 2), lightning_sg.Boundary(), nn.Linear(2, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).pow(2).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch)

        test_step = predict_step = validation_step

        def train_dataloader(self) -> Any:
            return data()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net()


def data() -> Any:
    return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)


def trainer(package: Any, **arguments: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return package.Trainer(**{"max_epochs": 1, "devices": 1, "enable_checkpointing": False, **quiet, **arguments})


def with_callback(package: Any) -> Any:
    return trainer(package, callbacks=[lightning_sg.SyntheticGradients()])


def appended() -> None:
    late = trainer(other)
    late.callbacks.append(lightning_sg.SyntheticGradients())
    late.fit(module(other), data())


def command_line(package: Any, *arguments: str) -> None:
    """The Trainer's options, all of them, are read from its signature."""
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options = [f"--trainer.{name}=false" for name in quiet] + ["--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    cli(type(module(package)), save_config_callback=None, args=["fit", *options, *arguments])


class Derived(lightning_sg.SyntheticGradientStrategy):
    """A user's own strategy."""


MIXTURES: dict[str, Callable[[], Any]] = {
    "a callback in a list": lambda: with_callback(other),
    "a callback alone": lambda: trainer(other, callbacks=lightning_sg.SyntheticGradients()),
    "a callback that comes later": appended,
    "a strategy": lambda: trainer(other, strategy=lightning_sg.SyntheticGradientStrategy()),
    "a derived strategy": lambda: trainer(other, strategy=Derived()),
    "a strategy's name": lambda: trainer(other, strategy="synthetic_gradients"),
    "a plugin": lambda: trainer(other, plugins=[lightning_sg.AtomicCheckpointIO()]),
    "a callback beside ours": lambda: trainer(
        ours, callbacks=[lightning_sg.SyntheticGradients(), other.callbacks.EarlyStopping("loss")]
    ),
    "a callback beside our strategy": lambda: trainer(
        ours, strategy="synthetic_gradients", callbacks=[other.callbacks.EarlyStopping("loss")]
    ),
    "a module to fit": lambda: with_callback(ours).fit(module(other), data()),
    "a module to validate": lambda: trainer(ours, strategy="synthetic_gradients").validate(module(other), data()),
    "a module to test": lambda: with_callback(ours).test(module(other), dataloaders=data()),
    "a module to predict": lambda: with_callback(ours).predict(model=module(other), dataloaders=data()),
    "a compiled module": lambda: with_callback(ours).fit(torch.compile(module(other)), data()),
    "a data module": lambda: with_callback(ours).fit(module(ours), datamodule=other.LightningDataModule()),
}

WORKING: dict[str, Callable[[], Any]] = {
    "all of ours": lambda: with_callback(ours).fit(module(ours), data()),
    "our strategy": lambda: trainer(ours, strategy="synthetic_gradients").fit(module(ours), data()),
    "our command line": lambda: command_line(ours, "--trainer.callbacks=lightning_sg.SyntheticGradients"),
    "the other's command line": lambda: command_line(other),
    "none of ours": lambda: trainer(other, callbacks=[other.Callback()]).fit(module(other), data()),
    "the logger of the other": lambda: trainer(
        ours, callbacks=[lightning_sg.SyntheticGradients()], logger=[other.loggers.CSVLogger(".")]
    ),
}


def outcome(mixture: Callable[[], Any]) -> list[str]:
    try:
        mixture()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    found = {
        "package": CHOICE.package,
        "mixtures": {name: outcome(mixture) for name, mixture in MIXTURES.items()},
        "working": {name: outcome(mixture) for name, mixture in WORKING.items()},
    }
    print("\n" + json.dumps(found))
