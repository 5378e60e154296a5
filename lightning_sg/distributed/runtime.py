"""Runs the user's own steps on the stages of this process: fake tensors before them, messages around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg.batch.copying import copy_of
from lightning_sg.batch.fingerprint import fingerprint
from lightning_sg.boundary import Crossing
from lightning_sg.crossings.evaluations import refuse_another_evaluation
from lightning_sg.crossings.replay import ReplayedBatch
from lightning_sg.distributed.blame import blaming, who_failed
from lightning_sg.distributed.first_uses import FirstUses
from lightning_sg.distributed.foreseen import ForeseenCrossings
from lightning_sg.distributed.logs import LogsOfStage
from lightning_sg.distributed.meetings import StageMeetings
from lightning_sg.distributed.metrics import MetricsRoute
from lightning_sg.distributed.outlet import NoOutlet, Outlet
from lightning_sg.distributed.ownership import StageOwnership
from lightning_sg.distributed.presence import AlwaysPresent, Presence
from lightning_sg.distributed.ready import ReadyStage
from lightning_sg.distributed.stage import Stage
from lightning_sg.distributed.stage_pass import WithoutDataError
from lightning_sg.distributed.startup import Cutter, SplitOptions, StartUp
from lightning_sg.distributed.status import Place, ProcessStatus, Stopping
from lightning_sg.distributed.training_pass import TrainingPass
from lightning_sg.errors import PartitionError, StageLostError, SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.partition.fakes import is_fake
from lightning_sg.partition.paging import PagedParameters
from lightning_sg.partition.step import later
from lightning_sg.passes import hearing_passes
from lightning_sg.rng import StepRandomness
from lightning_sg.runtime import Metrics
from lightning_sg.session import Session
from lightning_sg.subclasses import plain_beside_fakes
from lightning_sg.time_boundary import CutInTime
from lightning_sg.transport import Chain, ProcessGrid


class StageRuntime:
    """This process's part of a split run.

    Attributes:
        grid: The processes.
        chain: The links to the neighbours.
        meetings: What the stages do together over them.
        options: What the user said about the split.
        ownership: What of the training is this process's.
        status: What this process is doing.
        stopping: Whether and when training ends.
        presence: Whether this process works on a batch.
        around_training: Makes what is entered around each training step.

    Args:
        grid: The processes.
        chain: The links to the neighbours.
        options: What the user said about the split.
        pages: The parameters that are in files.
        cutter: Cuts the module.
    """

    def __init__(
        self, grid: ProcessGrid, chain: Chain, options: SplitOptions, pages: PagedParameters, cutter: Cutter
    ) -> None:
        self.grid = grid
        self.chain = chain
        self.ownership = StageOwnership(grid)
        self.status = ProcessStatus(grid, chain.watch)
        self.status.blame = partial(who_failed, chain, grid)
        self.meetings = StageMeetings(chain, self.status)
        self.stopping = Stopping()
        self.presence: Presence = AlwaysPresent()
        self.around_training: Callable[[], AbstractContextManager[None]] = nullcontext
        self._metrics = MetricsRoute(is_last=grid.is_last)
        self.options = options
        self._cutter = cutter
        self._start_up = StartUp(grid, chain, options, pages, cutter, self.ownership)
        self._stage: Stage | None = None
        self._ready: ReadyStage | None = None
        self._fingerprint = 0
        self._when_settled: list[Callable[[], None]] = []
        self._first_uses: FirstUses | None = None
        self._foreseen = ForeseenCrossings()

    # ------------------------------------------------------------------ for the callback

    @property
    def stage(self) -> Stage:
        """This process with the session of the module that is trained."""
        assert self._stage is not None
        return self._stage

    @property
    def leaves(self) -> list[Tensor]:
        """See :attr:`Runtime.leaves`."""
        batch = None if self._ready is None else self._ready.batch
        return batch.leaves if isinstance(batch, TrainingPass) else []

    def follow(self, session: Session) -> None:
        """See :meth:`Runtime.follow`."""
        settings = self._cutter.settings
        session.replays.rerun = self.rerun
        self._stage = Stage(
            self.grid,
            session,
            self.status,
            self.stopping,
            self._metrics,
            StepRandomness(self.grid.device) if self._stage is None else self._stage.randomness,
            self.options.wire,
            settings.delay,
            settings.inputs is not None,
        )

    def open_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Opens the boundaries in time; those between stages wait for the step."""
        self.stage.session.open_in_time(trainer.strategy.root_device)

    def route(self, metrics: Metrics) -> Metrics:
        """See :meth:`Runtime.route`: metrics travel with the activations to the last stage, where loggers are."""
        outlet = NoOutlet() if self._ready is None else self._ready.program.outlet
        if outlet.boundary is not None and outlet.untaught:
            untaught = {"untaught": torch.tensor(float(outlet.untaught))}
            metrics = {**metrics, outlet.boundary: {**metrics.get(outlet.boundary, {}), **untaught}}
        return self._metrics.route(metrics, self.stage.session.module.trainer)

    def flush(self) -> None:
        """See :meth:`Runtime.flush`: from the last stage to the first."""
        outlet: Outlet = NoOutlet() if self._ready is None else self._ready.program.outlet
        if outlet.boundary is not None:
            outlet.trainer.collect()
        self.stage.session.replay_all()

    def rerun(self, batch: ReplayedBatch, crossings: Mapping[str, Crossing]) -> None:
        """See :class:`~lightning_sg.crossings.replay.Rerun`."""
        assert self._ready is not None
        numbers = StepRandomness(self.grid.device)
        numbers.count(batch.number, training=True)
        with blaming(self.status), self._explaining(self._ready):
            self._ready.rerun(batch, crossings, numbers)

    def restore_predictors(self, state: dict[str, Any]) -> None:
        """Restores what a session has saved in this process alone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of predictors that are other processes'
            self._cutter.load_state_dict(state)

    def gather(self, states: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`Runtime.gather`."""
        return self.meetings.union("saving predictors", states)

    # ------------------------------------------------------------------ steps

    def take_batch(self, batch: Any) -> None:
        """Notes which batch the next step is about, to compare with the neighbours."""
        self._fingerprint = fingerprint(batch)

    def run(self, name: str, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs one step of the user's on this process's stages.

        Returns:
            In the last stage what the user's step returned; elsewhere, in training, a surrogate loss whose
            ``backward`` passes the synthetic gradient into the stage; elsewhere, in evaluation, ``None``.
        """
        number = kwargs.get("batch_idx", args[1] if len(args) > 1 else "")
        self.status.doing = f"{name.removesuffix('_step')} batch {number}".strip()
        training = name == "training_step"

        def call(ahead: int = 0) -> Any:
            positional, named = later(args, kwargs, ahead)
            return step(*copy_of(positional), **copy_of(named))

        if training and self.stage.session.batch is not None:
            refuse_another_evaluation(self.stage.session.batch, self.stage.session.module)
        ready = self._made_ready(call, args, training)
        loader = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
        self.status.begin_step(Place.of(self.status.doing, self.stage.session.module.trainer, name, loader))
        self.stage.randomness.count(self.stage.session.batches, training=training)
        if self.presence.skips(self.status.number):
            return self._skip(training=training)
        if ready is None:
            numbers, session = self.stage.randomness, self.stage.session
            with numbers, hearing_passes(session.module, session.boundaries.sites, numbers.next_stage):
                result = step(*args, **kwargs)
            return result if training or self.grid.is_last else None
        ready.call = call
        around = self.around_training if training else nullcontext
        by_hand = training and not self.stage.session.module.automatic_optimization  # it runs to its end everywhere
        most = None if by_hand else self._foreseen.most(self.stage, name, (args, kwargs), call)
        with blaming(self.status), self._explaining(ready), around(), plain_beside_fakes((args, kwargs)):
            return ready.run(lambda: step(*args, **kwargs), self._fingerprint, most, training=training)

    def _skip(self, *, training: bool) -> None:
        """Passes by a step that this process does not work on, as it was started anew and has to catch up."""
        if training:
            self.stage.session.pass_by()

    @contextmanager
    def _explaining(self, ready: ReadyStage) -> Iterator[None]:
        """Says which parameters are to blame for a tensor without data."""
        try:
            yield
        except WithoutDataError as error:
            raise PartitionError(str(self._start_up.explained(error, self.stage, ready.call))) from error
        missing = ready.logs.take_missing()
        if missing and self.grid.is_last:  # a warning has been given, but it may be the stage's own result
            what = WithoutDataError(f"{self.status.name}: '{missing[0]}' of {self.status.doing}")
            found = self._start_up.explained(what, self.stage, ready.call)
            if found.names:
                raise PartitionError(str(found))

    def _made_ready(self, call: Callable[[], Any], args: Any, training: bool) -> ReadyStage | None:
        """Traces the first step that runs the network, and the first training step that does.

        Returns:
            ``None`` before there was one: then every process runs the step as it is.
        """
        ready = self._ready
        if ready is not None and (ready.traced_training or not training):
            return ready
        batch = args[0] if args else None
        with self.stage.profiler.profile(profiling.START_UP):
            if ready is None:
                if not self._start_up.choose_cuts(self.stage.session, call, batch, training=training):
                    return None
                program = self._start_up.first_program(self.stage, call, batch, training=training)
            else:
                program = self._start_up.next_program(self.stage, ready.program, call, batch)
        if program is None:
            return ready
        logs = LogsOfStage(self.stage.session.module, self.status)
        self._ready = ReadyStage(self.stage, program, logs, call, traced_training=training)
        self._first_uses = program.first_uses
        if training:
            self.settle()
        return self._ready

    def when_settled(self, call: Callable[[], None]) -> None:
        """Puts off what has to know which stages this process trains."""
        self._when_settled.append(call)

    def settle(self) -> None:
        """Does what was put off."""
        calls, self._when_settled = self._when_settled, []
        for call in calls:
            call()

    def agree_on_owners(self) -> None:
        """All processes of the replica learn who trains what no traced step has used. A collective."""
        if self._first_uses is not None and self._first_uses.watches:
            for owners in self.meetings.gather("who trains what", self._first_uses.owners):
                self._first_uses.hear(owners)

    def backward(self, loss: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """See :meth:`Runtime.backward`."""
        if self._ready is None:  # no step has run the network so far
            return run(loss)
        batch = self._ready.batch
        assert isinstance(batch, TrainingPass)
        with blaming(self.status), self._explaining(self._ready):
            return batch.backward(loss, run)

    def end_batch(self) -> None:
        """The training batch is over: closes it towards the neighbours, even if it had no backward pass."""
        batch = None if self._ready is None else self._ready.batch
        if self._ready is not None and isinstance(batch, TrainingPass):
            batch.close()
            self._ready.batch = None

    @property
    def borrowed(self) -> set[int]:
        """The ids of the parameters trained here that are copies of another process's."""
        return set() if self._ready is None else self._ready.program.tied.borrowed

    def accumulating(self) -> AbstractContextManager[None]:
        """While entered, gradients are not averaged over the replicas."""
        return nullcontext() if self._ready is None else self._ready.program.data_parallel.accumulating()

    @property
    def final(self) -> bool:
        """Whether training ends after the batch that has just been counted."""
        return self.stopping.final(self.stage.session.batches)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends a run in good order: waits for targets under way and says goodbye to the neighbours."""
        self.flush()
        ready, self._ready = self._ready, None
        if ready is None:
            return
        self.stage.session.collect()
        ready.program.outlet.await_answers(None, 0)
        for link in self.chain.links:
            link.inbox.forget()
        for child in self.stage.session.module.modules():  # a remote block may have kept fake outputs
            for name, value in child.__dict__.items():
                if is_fake(value):
                    child.__dict__[name] = None
            if isinstance(child, CutInTime):
                child.drop_fakes()

    def end(self) -> None:
        """All processes have come to the end of a run; nothing is under way between them any more."""
        self.meetings.gather("the end of the run", None)
        self.chain.flush()

    def fail(self, error: BaseException) -> None:
        """Tells the neighbours why this process stops."""
        if self.status.failed:
            return
        self.status.failed = True
        if isinstance(error, StageLostError):
            reason = error.reason
        else:
            reason = str(error) if isinstance(error, SyntheticGradientsError) else f"{type(error).__name__}: {error}"
        self.chain.fail(reason[:2000])
        if self.grid.peers.count > 1 and self.chain.news is not None:
            self.chain.news.fail(reason[:2000])


__all__ = ["StageRuntime"]
