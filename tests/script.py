"""A user's training script, for the launchers: started as a program, not collected as a test."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger

import lightning_sg
from tests.models import Classifier, loader, make_trainer


class Slow(pl.Callback):
    """Says when training goes on, then takes its time."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and trainer.is_global_zero:
            print("TRAINING", flush=True)
        time.sleep(0.05)


def look_back(folder: Path) -> None:
    """Says whether the process group was left before Python ends: what was registered last is called first."""
    if not dist.is_initialized():
        (folder / f"left-{os.environ.get('LOCAL_RANK', '0')}").touch()


def main(mode: str, folder: Path) -> None:
    atexit.register(look_back, folder)
    pl.seed_everything(5, verbose=False)
    module = Classifier()
    start = {"start_method": mode} if mode in ("spawn", "fork") else {}
    trainer = make_trainer(
        strategy=lightning_sg.SyntheticGradientStrategy(timeout=30.0, **start),
        devices=2,
        max_epochs=1 if mode == "slow" else 2,
        callbacks=[Slow()] if mode == "slow" else [],
        logger=CSVLogger(folder) if mode == "popen" else False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(samples=16 * 2000 if mode == "slow" else 70), loader(shuffle=False))
    if trainer.is_global_zero:
        sums = {name: float(tensor.double().sum()) for name, tensor in module.state_dict().items()}
        (folder / f"{mode}.json").write_text(json.dumps(sums))
    (folder / f"ended-{os.environ.get('LOCAL_RANK', '0')}").touch()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
