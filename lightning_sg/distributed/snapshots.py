"""What a process writes down so that a new process can take its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lightning_sg.checkpoint.sharded import own_weights
from lightning_sg.checkpoint.whole import own_optimizer_state
from lightning_sg.distributed.not_waiting import not_waiting
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.errors import StageLostError, SyntheticGradientsError
from lightning_sg.files import write_atomically
from lightning_sg.lightning_api import pl
from lightning_sg.objects import pack, unpack
from lightning_sg.plain import plain
from lightning_sg.words import first_line


class SnapshotFile:
    """The file of one process; a newer snapshot replaces the older.

    Args:
        folder: Where it is.
        rank: The global rank of the process.
        attempt: The name of this attempt at the run: a snapshot of another is of no use.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int, attempt: str) -> None:
        self.path = Path(folder) / f"rank-{rank}.snapshot"
        self._rank = rank
        self._attempt = attempt
        self._is_checked = False

    def write(self, state: dict[str, Any]) -> None:
        """Writes a snapshot: all of it, or nothing.

        Raises:
            SyntheticGradientsError: If it could not be read, as it has more in it than tensors and plain values.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as file:
            torch.save({**state, "attempt": self._attempt}, file)
        if not self._is_checked:  # the next have the same form
            self._check()

    def _check(self) -> None:
        self._is_checked = True
        try:
            self._load()
        except Exception as error:
            raise SyntheticGradientsError(
                f"Away(folder=...): rank {self._rank} cannot read its own snapshot {self.path} ({first_line(error)}). "
                "The states of optimizers, schedules, callbacks and precision must be tensors, numbers and strings."
            ) from error

    def _load(self) -> Any:
        return torch.load(self.path, map_location="cpu", weights_only=True)  # runs no code

    def read(self) -> dict[str, Any]:
        """The newest snapshot of this run.

        Raises:
            StageLostError: If there is none.
        """
        try:
            state = self._load()
        except FileNotFoundError as error:
            raise self._unusable("there is none: the first is written after the first training batch") from error
        except Exception as error:  # whatever is there in its place
            raise self._unusable(f"it cannot be read ({first_line(error)})") from error
        if not isinstance(state, dict) or state.get("attempt") != self._attempt:
            raise self._unusable("it is of another run")
        return state

    def remove(self) -> None:
        """Removes it: a new process could not go on from there."""
        self.path.unlink(missing_ok=True)

    def _unusable(self, why: str) -> StageLostError:
        return StageLostError(
            f"rank {self._rank} was started while the others run already, and needs its snapshot {self.path} to take "
            f"the place of the process before it, but {why}. Start all processes anew."
        )


def progress(trainer: pl.Trainer) -> dict[str, Any]:
    """Lightning's own progress at the start of a training epoch."""
    loops = trainer.fit_loop.state_dict()
    for counts in loops["epoch_progress"].values():
        if isinstance(counts, dict):
            counts["ready"] -= 1  # the epoch that begins is counted already, and will be again
    return {
        "epoch": trainer.current_epoch,
        "resumed": trainer.ckpt_path is not None,
        "loops": plain(loops),
        "schedulers": schedulers(trainer),
        "callbacks": callbacks(trainer),
    }


def schedulers(trainer: pl.Trainer) -> list[Any]:
    """The states of the learning rate schedules."""
    return [plain(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]


def load_schedulers(trainer: pl.Trainer, states: list[Any]) -> None:
    """Restores :func:`schedulers`."""
    for config, state in zip(trainer.lr_scheduler_configs, states):
        config.scheduler.load_state_dict(state)


def callbacks(trainer: pl.Trainer) -> dict[str, Any]:
    """The states of all callbacks but this package's own, packed."""
    states: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key == "SyntheticGradients":  # whose state is this process's own, see `stage_state`
            continue
        try:
            state = callback.state_dict()
            if state:
                states[callback.state_key] = pack(state)  # a copy: callbacks go on with what they hand out
        except SyntheticGradientsError:  # what cannot be written as plain values starts afresh
            continue
    return states


def load_callbacks(trainer: pl.Trainer, states: dict[str, Any]) -> None:
    """Restores :func:`callbacks`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in states:
            callback.load_state_dict(unpack(states[callback.state_key]))


def stage_state(runtime: StageRuntime, trainer: pl.Trainer) -> dict[str, Any]:
    """The weights, optimizers, schedules and predictors of this process's stages. Waits for nobody."""
    session, placement = runtime.stage.session, runtime.ownership.placement
    assert placement is not None
    position, module = runtime.grid.position, session.module
    with not_waiting(session.trainers.values(), session.inputs.trainers.values()):
        predictors = session.state_dict(lambda own: own)
    return {
        "weights": own_weights(module, runtime.ownership.holds),
        "optimizers": [
            plain(own_optimizer_state(optimizer, module, placement, position)) for optimizer in trainer.optimizers
        ],
        "schedulers": schedulers(trainer),
        "callbacks": callbacks(trainer),
        "precision": trainer.precision_plugin.state_dict(),
        "predictors": predictors,
        "number": runtime.status.number,
        "meetings": runtime.chain.meetings,
        "ends": runtime.stopping.ends,
        "wanted": runtime.stopping.wanted,
    }


def load_stage(runtime: StageRuntime, trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Restores :func:`stage_state`."""
    runtime.stage.session.module.load_state_dict(state["weights"], strict=False)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    load_schedulers(trainer, state["schedulers"])
    load_callbacks(trainer, state["callbacks"])
    trainer.precision_plugin.load_state_dict(state["precision"])
    runtime.restore_predictors(state["predictors"])
    runtime.chain.meetings = state["meetings"]
    runtime.stopping.ends, runtime.stopping.wanted = state["ends"], state["wanted"]


__all__ = [
    "SnapshotFile",
    "callbacks",
    "load_callbacks",
    "load_schedulers",
    "load_stage",
    "progress",
    "schedulers",
    "stage_state",
]
