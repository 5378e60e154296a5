"""Lets a new process take the place of one that is gone while the others go on."""

from __future__ import annotations

import logging
from typing import Any

from lightning_sg._compat import continue_loops, resume_from_nothing
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.distributed.snapshots import (
    SnapshotFile,
    load_callbacks,
    load_schedulers,
    load_stage,
    progress,
    stage_state,
)
from lightning_sg.errors import StageLostError
from lightning_sg.lightning_api import pl
from lightning_sg.objects import pack, unpack
from lightning_sg.rng import random_state, set_random_state
from lightning_sg.transport import Chain

_log = logging.getLogger(__name__)


class Continuity:
    """Writes snapshots of this process, and restores one if this process takes another's place.

    A snapshot is the point at which the epoch began, what was told in meetings since, and the state of this process's
    stages after some batch. A new process goes through the epoch from its start with the same data, without training
    and without asking anybody, until it has come to that batch. There it takes the state, goes on without training to
    the batch that its neighbours are at, and takes part again.

    Args:
        file: Where snapshots are.
        every: After how many batches one is written.
        chain: The links to the neighbours, and what was told over them.
        rejoins: Whether this process takes the place of another.
    """

    def __init__(self, file: SnapshotFile, every: int, chain: Chain, *, rejoins: bool) -> None:
        self._file = file
        self._every = every
        self._chain = chain
        self._runtime: StageRuntime | None = None
        self._base: dict[str, Any] | None = None
        self._last = (-1, -1)  # the batch and the meeting of the newest snapshot
        self._has_trained = False
        self._snapshot: dict[str, Any] | None = None
        self._first = 0  # the batch from which on this process takes part
        chain.history.recording = True
        if rejoins:
            self._snapshot = snapshot = file.read()
            chain.watch.returning = True
            chain.history.restore_start(snapshot["history"]["start"])
            self._first = chain.begin_at(snapshot["stage"]["number"] + 1)

    @classmethod
    def of(cls, chain: Chain, *, is_first: bool) -> Continuity | None:
        """That of this process; ``None`` if no other may take its place, as it is rank 0 or nobody asked for it.

        Args:
            chain: The links of this process.
            is_first: Whether they are the first: a new process would look for those.

        Raises:
            StageLostError: If this process came to take the place of another, and cannot.
        """
        away, run = chain.watch.away, chain.news
        if away is None or away.folder is None or run is None or run.rank == 0 or not is_first:
            return None
        if run.outlives:
            _log.warning(
                "Away(folder=...) has no effect here: the launcher (torchrun) keeps the store of the run for later "
                "attempts, and ends all processes when one is killed."
            )
            return None
        try:
            return cls(SnapshotFile(away.folder, run.rank, run.attempt), away.every, chain, rejoins=run.rejoins)
        except StageLostError as error:
            chain.fail(error.reason)
            raise

    def follow(self, runtime: StageRuntime, trainer: pl.Trainer) -> None:
        """This process's part of a run."""
        if self._has_trained:
            self._retire()
        self._runtime, runtime.presence = runtime, self
        if self._snapshot is not None and not self._snapshot["base"]["resumed"]:
            resume_from_nothing(trainer)  # a checkpoint has been written since, and the script may ask for it

    def skips(self, number: int) -> bool:
        """Whether this process does not work on a batch."""
        if self._snapshot is not None:
            return True
        if number >= self._first:
            self._chain.watch.returning = False
            return False
        return True

    def training_starts(self, trainer: pl.Trainer) -> None:
        """Goes to the epoch of the snapshot."""
        self._has_trained = True
        if self._snapshot is None:
            return
        base = self._snapshot["base"]
        if base["epoch"] or base["resumed"]:
            continue_loops(trainer, base["loops"])
        load_schedulers(trainer, base["schedulers"])
        load_callbacks(trainer, base["callbacks"])

    def _retire(self) -> None:
        """Another run begins, which no new process could take part in: it would begin at the first of the script."""
        self._base, self._chain.history.recording = None, False
        self._file.remove()
        self._chain.saved_for_good()

    def epoch_starts(self, trainer: pl.Trainer) -> None:
        """Notes where a new process would begin."""
        runtime, history = self._runtime, self._chain.history
        assert runtime is not None
        if self._snapshot is not None:
            self._base = self._snapshot["base"]
            runtime.status.number = self._base["number"]
            history.restore(self._snapshot["history"]["told"])
            set_random_state(unpack(self._base["random"]), runtime.grid.device)
        elif history.recording:
            history.begin_anew()
            self._base = {
                **progress(trainer),
                "number": runtime.status.number,
                "random": pack(random_state(runtime.grid.device)),
            }
            self._last = (-1, -1)

    def batch_ends(self, trainer: pl.Trainer) -> None:
        """Takes the state of the snapshot, if it was taken here, or writes a new one if one is due."""
        runtime = self._runtime
        assert runtime is not None
        number = runtime.status.number
        if self._snapshot is not None:
            if number == self._snapshot["stage"]["number"]:
                self._restore(runtime, trainer)
            return
        if self._base is None or number + 1 < self._first or runtime.ownership.placement is None:
            return
        batch, meeting = self._last
        if batch < 0 or number - batch >= self._every or meeting != self._chain.meetings:
            state = {"base": self._base, "stage": stage_state(runtime, trainer), "history": self._chain.history.state()}
            self._file.write(state)
            self._last = (number, self._chain.meetings)
            self._chain.saved()

    def _restore(self, runtime: StageRuntime, trainer: pl.Trainer) -> None:
        assert self._snapshot is not None
        stage = self._snapshot["stage"]
        load_stage(runtime, trainer, stage)
        self._chain.history.replaying = False
        self._snapshot = None
        _log.warning(
            "%s was started anew. It has the state of batch number %d and takes part from number %d on (training and "
            "evaluation count together): %d batches are not trained by its stages.",
            runtime.status.name,
            stage["number"],
            self._first,
            self._first - stage["number"] - 1,
        )


__all__ = ["Continuity"]
