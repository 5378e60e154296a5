"""A user's training script, for the launchers: started as a program, not collected as a test."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
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


class Dies(pl.Callback):
    """Ends one process in the middle of the second epoch, the first time it gets there.

    Args:
        folder: Where it leaves a mark that it did.
        rank: The process, by default that of the first stage.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.mark = folder / "died"
        self.rank = rank

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, 8) and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def resume(module: pl.LightningModule, folder: Path, dies: bool) -> None:
    """Trains from the last checkpoint if there is one: what a script under torchrun with restarts does."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    checkpoint = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_last=True)  # at the end of each epoch
    trainer = make_trainer(
        strategy=lightning_sg.SyntheticGradientStrategy(timeout=30.0),
        devices=2 // nodes,
        num_nodes=nodes,
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[checkpoint, *([Dies(folder, int(os.environ.get("DIES", "1")))] if dies else [])],
    )
    last = folder / "last.ckpt"
    trainer.fit(module, loader(shuffle=False), ckpt_path=str(last) if last.exists() else None)
    if trainer.is_global_zero:
        restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
        torch.save({"restarts": restarts, "state": module.state_dict()}, folder / "end.pt")


def main(mode: str, folder: Path) -> None:
    atexit.register(look_back, folder)
    pl.seed_everything(5, verbose=False)
    module = Classifier()
    start = {"start_method": mode} if mode in ("spawn", "fork") else {}
    if mode in ("restarted", "undisturbed"):
        resume(module, folder, mode == "restarted")
        return
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
