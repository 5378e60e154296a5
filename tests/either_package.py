"""A user's program that imports Lightning from the package it is told; started as a program, not collected as a test.

    python -m tests.either_package PACKAGE FOLDER TASK

It leaves ``state.pt`` and ``last.ckpt`` in the folder.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PACKAGE = sys.argv[1] if __name__ in ("__main__", "__mp_main__") else "lightning"
pl: Any = importlib.import_module({"lightning": "lightning.pytorch"}.get(PACKAGE, PACKAGE))
Callback: Any = pl.Callback
ModelCheckpoint: Any = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint

import lightning_sg  # noqa: E402  as in a user's program, after the package that it is to take


class Net(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.cut, self.second = nn.Linear(6, width), lightning_sg.Boundary(), nn.Linear(width, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.second(self.cut(torch.relu(self.first(batch[0])))), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.second(self.cut(torch.relu(self.first(batch[0]))))
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Data(pl.LightningDataModule):  # type: ignore[misc]
    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(40, 6, generator=generator)
        return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=8)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def fit(folder: Path, epochs: int, **arguments: Any) -> None:
    """Trains to so many epochs, from the folder's ``last.ckpt`` if there is one."""
    pl.seed_everything(3, verbose=False)
    module = Net()
    callbacks = [lightning_sg.SyntheticGradients(), ModelCheckpoint(folder, save_last=True)]
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET, **{"devices": 1, **arguments})
    last = folder / "last.ckpt"
    trainer.fit(module, datamodule=Data(), ckpt_path=str(last) if last.exists() else None)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "state.pt")


def command_line(folder: Path) -> None:
    """The package's own LightningCLI, with the callback and the strategy as a configuration names them."""
    config = folder / "config.yaml"
    config.write_text(
        "seed_everything: 3\n"
        "trainer:\n"
        "  max_epochs: 4\n"
        "  strategy: {class_path: lightning_sg.SyntheticGradientStrategy, init_args: {timeout: 30}}\n"
        "  callbacks:\n"
        "    - class_path: lightning_sg.SyntheticGradients\n"
        "      init_args: {delay: 1, predictor: {class_path: lightning_sg.AutoPredictor}}\n"
        f"    - class_path: {pl.__name__}.callbacks.ModelCheckpoint\n"
        f"      init_args: {{dirpath: {folder}, save_last: true}}\n"
    )
    cli = importlib.import_module(f"{pl.__name__}.cli").LightningCLI
    quiet = [f"--trainer.{name}={value}" for name, value in {**QUIET, "devices": 1}.items()]
    done = cli(Net, Data, save_config_callback=None, args=["fit", f"--config={config}", *quiet])
    torch.save(done.model.state_dict(), folder / "state.pt")


def main(folder: Path, task: str) -> None:
    if task == "fit":
        fit(folder, 4)
    elif task == "half":
        fit(folder, 2)
    elif task == "popen":
        fit(folder, 4, devices=2, strategy="synthetic_gradients")
    elif task == "spawn":
        fit(folder, 4, devices=2, strategy=lightning_sg.SyntheticGradientStrategy(start_method="spawn"))
    elif task == "cli":
        command_line(folder)
    (folder / f"bases-{os.environ.get('LOCAL_RANK', '0')}").write_text(
        "\n".join(base.__module__ for base in lightning_sg.SyntheticGradients.__mro__)
    )
    others = {"lightning", "pytorch_lightning"} - {sys.argv[1]}
    assert not others & sys.modules.keys(), f"{others} was imported too"


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
