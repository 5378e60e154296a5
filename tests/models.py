"""Small LightningModules and data that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import Boundary, SyntheticGradientStrategy
from tests.ranks import DEVICE

FEATURES, CLASSES, SAMPLES = 12, 5, 70


def block(inputs: int, outputs: int) -> nn.Sequential:
    # No bias: before BatchNorm its gradient is rounding noise, which Adam would blow up to full steps.
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


class Classifier(pl.LightningModule):
    """Blocks with BatchNorm and a boundary after each but the last; logs a loss and an accuracy."""

    def __init__(self, stages: int = 4, width: int = 16, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        layers: list[nn.Module] = []
        size = FEATURES
        for _ in range(stages - 1):
            layers += [block(size, width), Boundary()]
            size = width
        self.net = nn.Sequential(*layers, block(size, width), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if loss.item() < 0:  # reads a value, which only the last stage has
            raise AssertionError
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(-1) == y).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(samples, CLASSES, generator=generator)).argmax(-1)
    return TensorDataset(x, y)


def loader(batch_size: int = 16, shuffle: bool = True, samples: int = SAMPLES) -> DataLoader[Any]:
    """The last batch is smaller than the others: 70 = 4 · 16 + 6."""
    return DataLoader(dataset(samples), batch_size=batch_size, shuffle=shuffle)


def make_trainer(**arguments: Any) -> pl.Trainer:
    """A quiet Trainer, on the CPU unless the tests run on a device."""
    defaults: dict[str, Any] = {
        "accelerator": DEVICE,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return pl.Trainer(**on_device({**defaults, **arguments}))


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer with several processes on as many GPUs as there are, several on one if need be."""
    processes, strategy = arguments["devices"], arguments.get("strategy")
    if DEVICE == "cpu" or processes == 1:
        return arguments
    if strategy == "synthetic_gradients":
        strategy = SyntheticGradientStrategy()
    if isinstance(strategy, SyntheticGradientStrategy):
        count = torch.cuda.device_count()
        strategy.parallel_devices = [torch.device(DEVICE, rank % count) for rank in range(processes)]
    return {**arguments, "strategy": strategy, "devices": "auto"}


def fit_and_save(
    module: pl.LightningModule, callback: Any, devices: int, folder: Path, checkpoint: str | None, epochs: int
) -> pl.Trainer:
    """Trains and validates on this number of processes, from a checkpoint or afresh; saves ``last.ckpt``."""
    trainer = make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        callbacks=[callback],
        max_epochs=epochs,
        default_root_dir=folder,
    )
    data = loader(shuffle=False)
    trainer.fit(module, data, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor], *, exact: bool = False) -> None:
    """Fails, naming the tensor, unless two states are equal (to float tolerance)."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        tolerance = 0.0 if exact else 1e-5
        torch.testing.assert_close(
            tensor, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
