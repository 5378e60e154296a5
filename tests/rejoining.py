"""Trains on several processes, of which some are killed and started again, as a supervisor would.

The files ``kill-<rank>-<moment>`` in a folder say which process is to be killed at which moment, once: ``train-70`` is
its 70th training batch, ``save-2`` its second checkpoint. As a program, ``python tests/rejoining.py <folder>``, it is
the script of a user whose processes Lightning starts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sg import Away, SyntheticGradients, SyntheticGradientStrategy
from tests.models import Classifier, loader, make_trainer
from tests.ranks import child, free_port

BATCHES, EPOCHS = 30, 2
_AWAY = Away(batches=BATCHES, seconds=60.0, patience=1.0)
_PATIENCE = 120.0  # seconds, far more than any run needs


class Killed(pl.Callback):
    """Has the process killed where the folder says so; notes its batches there.

    Args:
        folder: See above.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()

    def _come_to(self, moment: str, trainer: pl.Trainer) -> None:
        mark = self.folder / f"kill-{trainer.global_rank}-{moment}"
        if mark.exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Any, *_arguments: Any) -> None:
        self._come_to(f"train-{trainer.global_step}", trainer)

    def on_save_checkpoint(self, trainer: Any, *_arguments: Any) -> None:
        self.counts["save"] += 1
        self._come_to(f"save-{self.counts['save']}", trainer)


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


def train(stages: int, seed: int = 5, folder: Path | None = None, **options: Any) -> pl.Trainer:
    """Trains, from the last checkpoint if there is one, as scripts that may be restarted do."""
    pl.seed_everything(seed, verbose=False)
    module = Noting(folder, stages)
    callbacks = [SyntheticGradients(), *options.pop("callbacks", [])]
    trainer = make_trainer(max_epochs=EPOCHS, val_check_interval=0.5, callbacks=callbacks, **options)
    last = None if folder is None else folder / "last.ckpt"
    checkpoint = last if last is not None and last.exists() else None
    trainer.fit(module, loader(samples=16 * BATCHES), loader(shuffle=False), ckpt_path=checkpoint)
    return trainer


def train_split(folder: Path, processes: int, away: Away, checkpoint: str = "whole") -> dict[str, Any]:
    """Trains on several processes.

    Returns:
        What this one ends with.
    """
    log = logging.FileHandler(folder / "log")
    logging.getLogger("lightning_sg").addHandler(log)
    away = dataclasses.replace(away, folder=folder / "snapshots", every=5)
    trainer = train(
        processes,
        folder=folder,
        strategy=SyntheticGradientStrategy(timeout=60.0, away=away, checkpoint=checkpoint),
        devices=processes,
        enable_checkpointing=True,
        callbacks=[Killed(folder), ModelCheckpoint(folder, save_last=True, monitor="val_loss")],
    )
    callback = next(each for each in trainer.callbacks if isinstance(each, SyntheticGradients))
    return {
        "pid": os.getpid(),
        "loss": float(trainer.callback_metrics["val_loss"]),
        "steps": trainer.global_step,
        "batches": callback.session.batches,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "state": {name: tensor.clone() for name, tensor in trainer.lightning_module.state_dict().items()},
    }


@dataclass
class Supervised:
    """Processes with the environment variables of torchrun, each of which is started again when it is killed.

    Attributes:
        folder: Where they leave their files.
        processes: How many there are.
        checkpoint: How they write checkpoints.
        alone: How many batches the first stage trains before a killed process is started again: an outage that is long
            enough, however fast the machine is.
        restarts: Whether a killed process is started again at all.
        pids: For each rank, its processes.
    """

    folder: Path
    processes: int = 3
    checkpoint: str = "whole"
    alone: int = 0
    restarts: bool = True
    away: Away = _AWAY
    pids: dict[int, list[int]] = field(default_factory=dict)

    def kill(self, rank: int, moment: str) -> Supervised:
        """Has the process of a rank killed; see above for the moments."""
        (self.folder / f"kill-{rank}-{moment}").touch()
        return self

    def run(self) -> list[Any]:
        """Supervises the processes to their ends.

        Returns:
            What each rank ends with, or a :class:`Failure`; ``None`` if it was killed for good.
        """
        port = free_port()
        ranks = [_Rank(self, rank, port) for rank in range(self.processes)]
        deadline = time.monotonic() + _PATIENCE
        try:
            while sum(each.goes_on() for each in ranks) and time.monotonic() < deadline:  # looks after all of them
                time.sleep(0.05)
            return [each.result for each in ranks]
        finally:
            for each in ranks:
                each.end()

    @property
    def log(self) -> str:
        """What the package has logged in all processes."""
        return (self.folder / "log").read_text()

    def trained(self, rank: int) -> list[tuple[int, int]]:
        """The batches that a rank was trained with: the id of its process, and the step."""
        file = self.folder / f"trained-{rank}"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(pid), int(step)) for pid, step in (line.split() for line in lines)]


class _Rank:
    """One rank, and the processes that are it one after another.

    Attributes:
        result: What the last one ended with.
    """

    def __init__(self, run: Supervised, rank: int, port: int) -> None:
        self._run = run
        self._rank = rank
        self._port = port
        self.result: Any = None
        self._due: int | None = None  # how many batches the first stage must have trained before the next start
        self._start()

    def _start(self) -> None:
        run, context = self._run, get_context("fork")
        self._end, theirs = context.Pipe(duplex=False)

        def work() -> Any:
            return train_split(run.folder, run.processes, run.away, run.checkpoint)

        self._process: Any = context.Process(target=child, args=(self._rank, run.processes, self._port, work, theirs))
        self._process.start()
        theirs.close()
        run.pids.setdefault(self._rank, []).append(self._process.pid)

    def goes_on(self) -> bool:
        """Looks after the process; whether there is more to come of it."""
        if self.result is not None:
            return False
        if self._end.poll():
            try:
                self.result = pickle.loads(self._end.recv_bytes())
                return False
            except EOFError:
                self._process.join()
        if self._process.is_alive():
            return True
        if self._process.exitcode != -signal.SIGKILL or not self._run.restarts:
            return False
        first = len(self._run.trained(self._run.processes - 1))
        self._due = first + self._run.alone if self._due is None else self._due
        if first >= self._due:
            self._due = None
            self._start()
        return True

    def end(self) -> None:
        """Leaves no process behind."""
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    ended = train_split(
        where, 2, Away(batches=BATCHES, seconds=60.0, patience=1.0, folder=where / "snapshots", every=5)
    )
    torch.save(ended, where / f"ended-{os.environ.get('LOCAL_RANK', '0')}")
