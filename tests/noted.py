"""Notes what the predictors of a run are given to learn from, without getting in their way."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sg import SyntheticGradients
from lightning_sg.training import Record
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.ledger import Ledger


class NotingLedger(Ledger[Record]):
    """A ledger that remembers what was due, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Record] = []

    def due(self, now: int) -> list[Record]:
        ready = super().due(now)
        self.seen += ready
        return ready


class Watch(Callback):
    """Collects what each boundary's predictor was given to learn from."""

    def __init__(self) -> None:
        self.ledgers: dict[str, tuple[BoundaryTrainer, NotingLedger]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (callback,) = (c for c in trainer.callbacks if isinstance(c, SyntheticGradients))  # type: ignore[attr-defined]
        for name, boundary in callback.trainers.items():
            ledger = NotingLedger()
            self.ledgers[name], boundary.ledger = (boundary, ledger), ledger

    @property
    def steps(self) -> dict[str, list[int]]:
        """For each boundary, the batches that were due and not skipped."""
        return {
            name: [record.step for record in ledger.seen if not record.skipped]
            for name, (_boundary, ledger) in self.ledgers.items()
        }

    @property
    def learned(self) -> dict[str, list[tuple[int, Tensor]]]:
        """For each boundary, the batches that had a target, with the first tensor of it."""
        learned: dict[str, list[tuple[int, Tensor]]] = {}
        for name, (boundary, ledger) in self.ledgers.items():
            seen = learned.setdefault(name, [])
            for record in ledger.seen:
                exact = record.exact_due is not None and boundary.distance > 1
                targets = record.exact_targets if exact else record.targets
                if record.wants_target and targets is not None:
                    seen.append((record.step, targets[0]))
        return learned
