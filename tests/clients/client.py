"""What a test of somebody else's package needs to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import nn


class Client(ABC):
    """A model of a package as its users train it, with data made here from fixed seeds.

    An object trains once: :meth:`fit`, then :meth:`save`. Subclasses whose package makes its own Trainer override
    :meth:`fit`; the others name a module and a loader.

    Attributes:
        boundaries: Submodules to cut after, for two stages.
        context: A part of the batch that the predictor is to say that it predicts from, by itself or beside others;
            empty if nothing of the batch will do.
        epochs: How long a test trains.
        long: How many epochs plain training needs, at least, until its loss is half of its first.
        network: What was trained, after :meth:`fit`.
        trainer: What trained it, where the package tells.
        seed: For packages that have a setting for it; torch's and numpy's are set already.
    """

    boundaries: ClassVar[Sequence[str]]
    context: ClassVar[str] = ""
    epochs: ClassVar[int] = 4
    long: ClassVar[int] = 20

    seed: int = 0
    network: nn.Module
    trainer: Any

    @property
    @abstractmethod
    def lightning(self) -> ModuleType:
        """The Lightning that the package imports: ``lightning.pytorch`` or ``pytorch_lightning``."""

    def module(self) -> Any:
        """The LightningModule, with new weights."""
        raise NotImplementedError

    def loader(self) -> Any:
        """The training data, in batches."""
        raise NotImplementedError

    def validation(self) -> Any:
        """The validation data, if a run has any."""
        return None

    def fit(self, **trainer: Any) -> None:
        """Trains with these arguments of Lightning's Trainer, and keeps what was trained."""
        self.trainer = self.lightning.Trainer(**trainer, enable_checkpointing=False)
        self.network = self.module()
        self.trainer.fit(self.network, self.loader(), self.validation())

    def save(self, path: Path) -> None:
        """Saves what was trained, in every process."""
        self.trainer.save_checkpoint(path)

    @abstractmethod
    def load(self, path: Path) -> nn.Module:
        """What the package's own loader makes of the saved file; it has the names of :attr:`network`."""


__all__ = ["Client"]
