"""What this process is doing, for messages and for the other processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_sg.errors import StageLostError, SyntheticGradientsError
from lightning_sg.lightning_api import TrainerFn, pl
from lightning_sg.transport import ProcessGrid, Watch

# Steps whose places are kept: more than stages can be apart.
_REMEMBERED = 10_000


@dataclass(frozen=True)
class Place:
    """Where a process is in its data, as far as its neighbours must be at the same place.

    Attributes:
        doing: The batch, in words: "training batch 17".
        batches: How many batches the data loader gives; ``None`` if that is not known.
        last: Whether none comes after this one.
    """

    doing: str
    batches: int | None
    last: bool

    @classmethod
    def of(cls, doing: str, trainer: pl.Trainer, step: str, loader: int) -> Place:
        """Where a trainer is.

        Args:
            doing: The batch, in words.
            trainer: The trainer.
            step: ``"training_step"``, ``"validation_step"``, ``"test_step"`` or ``"predict_step"``.
            loader: Which of several loaders of evaluation.
        """
        loop, counts = _loop(trainer, step)
        if isinstance(counts, list):
            counts = counts[loader] if loader < len(counts) else math.inf
        return cls(doing, int(counts) if math.isfinite(counts) else None, loop.batch_progress.is_last_batch)


def _loop(trainer: pl.Trainer, step: str) -> tuple[Any, Any]:
    """The loop that runs a step, and how many batches it has, by loader."""
    if step == "training_step":
        return trainer.fit_loop.epoch_loop, trainer.num_training_batches
    if step == "validation_step":
        fits = trainer.state.fn == TrainerFn.FITTING
        loop = trainer.fit_loop.epoch_loop.val_loop if fits else trainer.validate_loop
        return loop, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    if step == "test_step":
        return trainer.test_loop, trainer.num_test_batches
    return trainer.predict_loop, trainer.num_predict_batches


class ProcessStatus:
    """This process in words, and whether it has failed.

    Attributes:
        name: Its name: "stage 1 (rank 0)".
        number: Counts its steps, training and evaluation together; -1 before the first.
        places: For each of its last steps, by number, where it was in its data.
        failed: Whether it has told the others that it fails.
        blame: Finds out which process has failed, when a collective breaks that names nobody.

    Args:
        grid: The processes.
        watch: Tells the neighbours what this process is doing.
    """

    def __init__(self, grid: ProcessGrid, watch: Watch) -> None:
        self.name = f"process {grid.position} of {len(grid.ranks)} (rank {grid.rank})"
        self.number = -1
        self.places: dict[int, Place] = {}
        self.failed = False
        self.blame: Callable[[], str] = lambda: "A process of another replica is gone: its own output says why."
        self._watch = watch
        self._timeout = grid.timeout

    @property
    def doing(self) -> str:
        """What it is doing: "training batch 17"."""
        return self._watch.doing

    @doing.setter
    def doing(self, words: str) -> None:
        self._watch.doing = words

    def begin_step(self, place: Place) -> None:
        """Another step begins."""
        self.number += 1
        self.places[self.number] = place
        self.places.pop(self.number - _REMEMBERED, None)

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
            reason = self.blame()
            raise StageLostError(
                f"{reason} {self.name} was waiting for the other replicas ({what} after {self.doing}, for at most "
                f"{self._timeout:g} s: {error}).",
                reason,
            ) from error


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


__all__ = ["Place", "ProcessStatus", "Stopping"]
