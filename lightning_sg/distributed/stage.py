"""This process in a split run, whatever batch it is at."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_sg import profiling
from lightning_sg.distributed.metrics import MetricsRoute
from lightning_sg.distributed.status import ProcessStatus, Stopping
from lightning_sg.rng import StepRandomness
from lightning_sg.session import Session
from lightning_sg.step_clock import StepClock, clock_of
from lightning_sg.transport import Compression, ProcessGrid


@dataclass(frozen=True)
class Stage:
    """What the batches on this process have in common.

    Attributes:
        grid: The processes.
        session: The training of the module.
        status: What this process is doing.
        stopping: Whether and when training ends.
        metrics: The metrics that pass through.
        randomness: Random numbers of a step.
        compression: How activations and targets travel in training.
        delay: That of the gradient predictors.
        predicts_inputs: Whether activations are predicted too.
    """

    grid: ProcessGrid
    session: Session
    status: ProcessStatus
    stopping: Stopping
    metrics: MetricsRoute
    randomness: StepRandomness
    compression: Compression = "full"
    delay: int = 1
    predicts_inputs: bool = field(default=False)

    @property
    def profiler(self) -> StepClock:
        """In front of the trainer's: waiting and sending are seen there beside Lightning's own actions."""
        return clock_of(self.session.module.trainer)

    @property
    def keeps_graph(self) -> bool:
        """Whether this process needs the graph of the current batch until its exact gradient arrives."""
        batch = self.session.batch
        if batch is None or not batch.plan.keeps_graph or self.grid.is_last:
            return False
        # The first process hands nothing on: only what it applies late, and boundaries within it, need the graph.
        applied = self.session.applied_late(batch.plan.applies)
        return not self.grid.is_first or bool(applied) or self.has_boundaries_within

    @property
    def has_boundaries_within(self) -> bool:
        """Whether there are boundaries between the stages of this process, besides the one at its end."""
        return sum(self.session.ownership.owns(name) for name in self.session.trainers) > 1

    def own_stages_begin(self, crossing: int = 0) -> None:
        """The step has come to this process's stages, from tensors without data.

        Args:
            crossing: How often it has come to them before.
        """
        if not crossing:
            self.profiler.stop(profiling.FAKE_TENSORS)

    def decide_end(self, batch: int) -> None:
        """In the first stage: if somebody wants to stop, says after which training batch.

        Args:
            batch: The number of the current training batch.
        """
        if self.grid.is_first and self.grid.peers.any(self.stopping.wanted) and self.stopping.ends is None:
            self.stopping.ends = batch + self._lead

    @property
    def _lead(self) -> int:
        """How many batches the last stage may be ahead of the first, and still hear of an end in time."""
        return (len(self.grid.ranks) - 1) * (1 + self.delay) if self.predicts_inputs else 0


__all__ = ["Stage"]
