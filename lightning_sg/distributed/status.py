"""What this process is doing, for messages and for the other processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_sg.errors import StageLostError, SyntheticGradientsError
from lightning_sg.transport import ProcessGrid, Watch


class ProcessStatus:
    """This process in words, and whether it has failed.

    Attributes:
        name: Its name: "stage 1 (rank 0)".
        number: Counts its steps, training and evaluation together; -1 before the first.
        batches: How many batches its data loader gives, for what it is doing; ``None`` if that is not known.
        failed: Whether it has told the others that it fails.

    Args:
        grid: The processes.
        watch: Tells the neighbours what this process is doing.
    """

    def __init__(self, grid: ProcessGrid, watch: Watch) -> None:
        self.name = f"process {grid.position} of {len(grid.ranks)} (rank {grid.rank})"
        self.number = -1
        self.batches: int | None = None
        self.failed = False
        self._watch = watch
        self._timeout = grid.timeout

    @property
    def doing(self) -> str:
        """What it is doing: "training batch 17"."""
        return self._watch.doing

    @doing.setter
    def doing(self, words: str) -> None:
        self._watch.doing = words

    def whose(self, number: int) -> str:
        """An earlier step, or the current one, in words for "the target of ..."."""
        behind = self.number - number
        ago = "this batch" if behind == 0 else f"{behind} batch{'es' * (behind > 1)} before"
        return f"{ago} ({self.doing} is going on)"

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """A collective of all processes: says in words what it means when it breaks.

        Args:
            what: What the processes meet for: "saving predictors".

        Raises:
            StageLostError: If another process is gone or does not come, or this one has failed before.
        """
        if self.failed:
            raise StageLostError(f"{self.name} failed at {self.doing}; no {what} with the other stages after that.")
        try:
            yield
        except SyntheticGradientsError:
            raise
        except RuntimeError as error:  # of a collective of torch's
            raise StageLostError(
                f"{self.name} waited for the other stages ({what} after {self.doing}), but one of them is gone or took "
                f"longer than {self._timeout:g} s. Its own output says why. ({error})"
            ) from error


def batches_of(trainer: pl.Trainer, step: str, loader: int) -> int | None:
    """How many batches a data loader gives to a step.

    Args:
        trainer: The trainer.
        step: ``"training_step"``, ``"validation_step"``, ``"test_step"`` or ``"predict_step"``.
        loader: Which of several loaders of evaluation.

    Returns:
        The number, or ``None`` if it is not known.
    """
    counts: Any = {
        "training_step": trainer.num_training_batches,
        "validation_step": trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches,
        "test_step": trainer.num_test_batches,
        "predict_step": trainer.num_predict_batches,
    }[step]
    if isinstance(counts, list):
        counts = counts[loader] if loader < len(counts) else math.inf
    return int(counts) if math.isfinite(counts) else None


class Stopping:
    """A wish to stop travels with the messages, so that all stages stop after the same batch.

    Attributes:
        wanted: Whether this process, or one after it, wants the training to end.
        ends: The number of the training batch after which training ends, once the first stage has decided.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.ends: int | None = None

    def final(self, batches: int) -> bool:
        """Whether training ends after the batch that has just been counted as one of ``batches``."""
        return self.ends is not None and batches > self.ends


__all__ = ["ProcessStatus", "Stopping", "batches_of"]
