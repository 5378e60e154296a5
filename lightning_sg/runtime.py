"""Where the stages run: what the strategy and the callback ask of it, and the answer for one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, Protocol

from torch import Tensor

from lightning_sg.boundary import Crossing
from lightning_sg.crossings.replay import ReplayedBatch, replaying
from lightning_sg.errors import PartitionError
from lightning_sg.lightning_api import pl, rank_zero_warn
from lightning_sg.ownership import Ownership, OwnsAll
from lightning_sg.partition.checks import check_cuts, check_gradients, check_trainable
from lightning_sg.partition.step import (
    Following,
    StepEnds,
    call_training_step,
    carries_gradient_later,
    inputs_on_values,
    trace_first_step,
    trains_later,
)
from lightning_sg.partition.trace import Trace
from lightning_sg.rng import StepRandomness
from lightning_sg.session import Session

Metrics = dict[str, dict[str, Tensor]]


class Runtime(Protocol):
    """Runs the stages: all of them in one process, or those of this process among several.

    Attributes:
        ownership: What of the training is this process's.
    """

    @property
    def ownership(self) -> Ownership: ...  # noqa: D102 (see above)

    @property
    def leaves(self) -> list[Tensor]:
        """What this process received of the current batch from the stage before, and carries a gradient."""

    def follow(self, session: Session) -> None:
        """Takes the session of the module that is trained."""

    def open_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """A training batch has begun in the session: opens the boundaries of this process, or gets ready to."""

    def route(self, metrics: Metrics) -> Metrics:
        """Takes this process's metrics of one batch and returns those that this process is to log."""

    def flush(self) -> None:
        """Brings in the exact gradients that are under way between processes. A collective."""

    def gather(self, states: dict[str, Any]) -> dict[str, Any]:
        """The union, on global rank 0, of all processes' states by boundary. A collective."""

    # ------------------------------------------------------------------ for the strategy

    def take_batch(self, batch: Any) -> None:
        """The next step is about this batch."""

    def run(self, name: str, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs one of the user's steps, such as ``"training_step"``."""

    def backward(self, loss: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Goes backward.

        Args:
            loss: What the step returned.
            run: Lightning's backward pass, of a loss and keyword arguments.
        """

    def accumulating(self) -> AbstractContextManager[None]:
        """While entered, gradients are not averaged over the replicas."""

    def fail(self, error: BaseException) -> None:
        """Tells the other processes why this one stops."""

    def close(self) -> None:
        """Ends a run in good order."""


class OneProcess:
    """All stages are in this process."""

    ownership: Ownership = OwnsAll()

    def __init__(self) -> None:
        self._session: Session | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """Nothing: nothing is received."""
        return []

    def follow(self, session: Session) -> None:
        """Takes the session of the module that is trained."""
        self._session = session
        session.replays.rerun = self.rerun

    def open_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Checks the cut on the first batch; opens the boundaries."""
        session = self._session
        assert session is not None
        if session.trace is None and len(session.boundaries):
            trace = _checked_trace(session, trainer, batch, batch_idx)
            if trace is not None:
                session.accept(trace)
        session.open_in_time(trainer.strategy.root_device)
        for site in () if session.trace is None else session.boundaries.sites:
            site.open(session.crossing(site.name).forward, without_gradient=False)

    def route(self, metrics: Metrics) -> Metrics:
        """Returns the metrics: they are logged here."""
        return metrics

    def flush(self) -> None:
        """Runs again what is still to be run again: nothing else is under way."""
        if self._session is not None:
            self._session.replay_all()

    def rerun(self, batch: ReplayedBatch, crossings: Mapping[str, Crossing]) -> None:
        """See :class:`~lightning_sg.crossings.replay.Rerun`."""
        assert self._session is not None
        module, sites = self._session.module, self._session.boundaries.sites
        numbers = StepRandomness(module.trainer.strategy.root_device)
        numbers.count(batch.number, training=True)
        with ExitStack() as stack:
            stack.enter_context(numbers)
            stack.enter_context(replaying(module, sites, batch, crossings, numbers.next_stage))
            stack.enter_context(suppress(StepEnds))
            call_training_step(module, batch.data, batch.index)

    def gather(self, states: dict[str, Any]) -> dict[str, Any]:
        """Returns the states: there are no others."""
        return states

    def take_batch(self, batch: Any) -> None:
        """Does nothing: nobody else could have another batch."""

    def run(self, name: str, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs the user's step."""
        return step(*args, **kwargs)

    def backward(self, loss: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Goes backward as Lightning does."""
        return run(loss)

    def accumulating(self) -> AbstractContextManager[None]:
        """Does nothing: there are no replicas."""
        return nullcontext()

    def fail(self, error: BaseException) -> None:
        """Does nothing: nobody is to be told."""

    def close(self) -> None:
        """Does nothing."""


def _checked_trace(session: Session, trainer: pl.Trainer, batch: Any, batch_idx: int) -> Trace | None:
    """Traces one step: is every boundary reached, and does nothing go around it?

    Returns:
        ``None`` if the step does nothing, so that a later one has to show it.

    Raises:
        BoundaryError: If a boundary is not reached, an activation goes around it, or no gradient flows back.
        PartitionError: If a stage has nothing to train.
    """
    module = session.module

    def run(ahead: int = 0) -> Any:
        with trainer.precision_plugin.train_step_context():
            return call_training_step(module, batch, batch_idx + ahead)

    device = trainer.strategy.root_device
    following = Following(module, session.boundaries.sites, device, without_gradient=False, batch=batch)
    try:
        trace = trace_first_step(following, run, training=True)
    except PartitionError as error:
        rank_zero_warn(f"The boundaries could not be checked before training, which goes on. {error}")
        return Trace(inputs=inputs_on_values(module, session.boundaries.sites, run, device, batch))
    if trace is None:
        return None
    if trace.cut_short is not None:
        rank_zero_warn(
            f"The check of the boundaries ended in the last stage, at {trace.cut_short}. If an activation of an "
            "earlier stage is used after that, its gradient goes around the boundary."
        )
    check_cuts(trace, split=False)
    sites = session.boundaries.sites
    check_trainable(module, trace, lambda: trains_later(module, sites, run, device))
    check_gradients(module, trace, lambda: carries_gradient_later(module, sites, run, device))
    return trace


__all__ = ["Metrics", "OneProcess", "Runtime"]
