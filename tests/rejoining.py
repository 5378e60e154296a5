"""A user's training script whose processes are killed and started again: started as a program, not collected as a test.

``python tests/rejoining.py <folder> <processes> <epochs>``; the files ``kill-<rank>-<moment>`` in the folder say which
process is to be killed at which moment, once: ``train-70`` is its 70th training batch, ``val-3`` its third validation
batch, ``save-2`` its second checkpoint, ``end-1`` the end of its first epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sg import Away, SyntheticGradients, SyntheticGradientStrategy
from tests.models import Classifier, loader, make_trainer

BATCHES = 40
PACE = 0.005  # seconds; the time of a step


class Killed(pl.Callback):
    """Has the process killed where the folder says so.

    Args:
        folder: See above.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()

    def come_to(self, moment: str, trainer: pl.Trainer) -> None:
        self.counts[moment] += not trainer.sanity_checking
        mark = self.folder / f"kill-{trainer.global_rank}-{moment}-{self.counts[moment]}"
        if mark.exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Any, *_arguments: Any) -> None:
        time.sleep(PACE)
        self.counts["train"] = trainer.global_step
        self.come_to("train", trainer)

    def on_validation_batch_start(self, trainer: Any, *_arguments: Any) -> None:
        self.come_to("val", trainer)

    def on_train_epoch_end(self, trainer: Any, *_arguments: Any) -> None:
        self.come_to("end", trainer)

    def on_save_checkpoint(self, trainer: Any, *_arguments: Any) -> None:
        self.come_to("save", trainer)


class Noting(Classifier):
    """Notes which batches it was trained with, and by which process."""

    def __init__(self, folder: Path | None, stages: int) -> None:
        super().__init__(stages)
        self.folder = folder

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.folder is not None and any(parameter.grad is not None for parameter in self.parameters()):
            with (self.folder / f"trained-{self.trainer.global_rank}").open("a") as file:
                file.write(f"{os.getpid()} {self.trainer.global_step}\n")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


def train(stages: int, epochs: int, seed: int = 5, folder: Path | None = None, **options: Any) -> pl.Trainer:
    """Trains, from the last checkpoint if there is one, as scripts that may be restarted do."""
    pl.seed_everything(seed, verbose=False)
    module = Noting(folder, stages)
    callbacks = [SyntheticGradients(), *options.pop("callbacks", [])]
    trainer = make_trainer(max_epochs=epochs, val_check_interval=0.5, callbacks=callbacks, **options)
    last = None if folder is None else folder / "last.ckpt"
    checkpoint = last if last is not None and last.exists() else None
    trainer.fit(module, loader(samples=16 * BATCHES), loader(shuffle=False), ckpt_path=checkpoint)
    return trainer


def main(folder: Path, processes: int, epochs: int) -> None:
    """Trains on several processes, and says how it ended."""
    away = Away(batches=30, seconds=60.0, patience=0.3, folder=folder / "snapshots", every=5)
    trainer = train(
        processes,
        epochs,
        folder=folder,
        strategy=SyntheticGradientStrategy(timeout=60.0, away=away),
        devices=processes,
        enable_checkpointing=True,
        callbacks=[Killed(folder), ModelCheckpoint(folder, save_last=True, monitor="val_loss")],
    )
    said = {
        "pid": os.getpid(),
        "loss": float(trainer.callback_metrics["val_loss"]),
        "step": trainer.global_step,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "sum": float(sum(tensor.double().sum() for tensor in trainer.lightning_module.state_dict().values())),
    }
    (folder / f"ended-{trainer.global_rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
