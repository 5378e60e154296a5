"""Traces the first step and places the stages: makes the program of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from lightning_sg.automatic import choose_names
from lightning_sg.distributed.data_parallel import DataParallel, NoReplicas, ReplicatedStages
from lightning_sg.distributed.first_uses import FirstUses
from lightning_sg.distributed.inlet import Inlet, NoInlet, UpstreamInlet
from lightning_sg.distributed.outlet import AnswerChannel, DownstreamOutlet, NoOutlet, Outlet, RemoteTargets
from lightning_sg.distributed.ownership import StageOwnership
from lightning_sg.distributed.program import SharedBuffers, StageProgram
from lightning_sg.distributed.stage import Stage
from lightning_sg.distributed.stage_pass import WithoutDataError
from lightning_sg.distributed.support import may_wait
from lightning_sg.distributed.tied import NoTiedWeights, SharedWeights, TiedWeights
from lightning_sg.errors import PartitionError, SyntheticGradientsError
from lightning_sg.lightning_api import pl, rank_zero_info
from lightning_sg.partition.averages import with_averages
from lightning_sg.partition.checks import check_cuts, check_gradients, check_trainable
from lightning_sg.partition.fakes import FakeOutputs, FakeTensors, remote_blocks
from lightning_sg.partition.paging import PagedParameters
from lightning_sg.partition.placement import Placement, assign, place
from lightning_sg.partition.step import (
    STEPS_AHEAD,
    Following,
    carries_gradient_later,
    trace_first_step,
    trace_step,
    trains_later,
)
from lightning_sg.partition.told import Told
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.work import Work
from lightning_sg.session import Session
from lightning_sg.settings import Settings
from lightning_sg.transport import Away, Chain, Compression, ProcessGrid

Choice = TypeVar("Choice")


class Cutter(Protocol):
    """Who cuts the module, and knows what the user said about it: the callback."""

    settings: Settings

    @property
    def is_cut(self) -> bool:
        """Whether the module of this run has its boundaries."""

    @property
    def undecided(self) -> bool:
        """Whether it is still to be chosen where to cut."""

    def saved_boundaries(self, stages: int) -> list[str] | None:
        """Where the checkpoint that is being resumed has its cuts, if they make so many stages."""

    def choose(self, names: list[str]) -> None:
        """Takes the automatic choice."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the predictors."""

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Session:
        """Cuts the module."""


@dataclass(frozen=True)
class SplitOptions:
    """What the user said to the strategy about the split.

    Attributes:
        wire: How activations and targets travel in training.
        tied: Whether stages on several processes may use one parameter.
        ddp: Arguments for ``DistributedDataParallel``.
        away: How long a stage may be silent.
    """

    wire: Compression = "full"
    tied: bool = False
    ddp: dict[str, Any] | None = None
    away: Away | None = None


class StartUp:
    """Makes the program of this process from its first steps.

    Args:
        grid: The processes.
        chain: The links to the neighbours.
        options: What the user said.
        pages: The parameters that are in files; those of its own stages, the process brings into memory.
        cutter: Cuts the module.
        ownership: Is told where the stages are placed.
    """

    def __init__(
        self,
        grid: ProcessGrid,
        chain: Chain,
        options: SplitOptions,
        pages: PagedParameters,
        cutter: Cutter,
        ownership: StageOwnership,
    ) -> None:
        self._grid = grid
        self._chain = chain
        self._options = options
        self._pages = pages
        self._cutter = cutter
        self._ownership = ownership

    def choose_cuts(self, session: Session, call: Callable[..., Any], batch: Any, *, training: bool) -> bool:
        """Cuts a module whose boundaries are to be chosen, where all replicas agree.

        Args:
            session: The training of the module, which ends here.
            call: Runs the step, or the one that comes so many batches later.
            batch: The batch that it is run on.
            training: Whether it is a training step.

        Returns:
            Whether there are boundaries now: a step of evaluation may run too little of the network to choose by.
        """
        cutter, module, stages = self._cutter, session.module, len(self._grid.ranks)
        if not cutter.undecided:
            return True
        names = cutter.saved_boundaries(stages)
        if names is None:
            names = self._chosen(module, call, batch, training=training)
        if names is None:
            return False
        cutter.choose(self._of_first_replica(names))
        cutter.cut(module.trainer, module)
        return True

    def _chosen(
        self, module: pl.LightningModule, call: Callable[..., Any], batch: Any, *, training: bool
    ) -> list[str] | None:
        """Where to cut, by the first of the next steps that shows enough; ``None`` if one of evaluation does not."""
        settings, stages, device = self._cutter.settings, len(self._grid.ranks), self._grid.device
        first: PartitionError | None = None
        for ahead in range(STEPS_AHEAD if training else 1):
            try:
                run, tied = partial(call, ahead), self._options.tied
                return choose_names(settings, module, stages, run, device, batch, tied=tied)
            except PartitionError as error:
                first = first or error
        if training and first is not None:
            raise first
        return None

    def first_program(
        self, stage: Stage, call: Callable[..., Any], batch: Any, *, training: bool
    ) -> StageProgram | None:
        """Traces a step, places the stages and connects with the neighbours. A collective of all processes.

        Args:
            stage: This process.
            call: Runs the step, or the one that comes so many batches later.
            batch: The batch that it is run on.
            training: Whether it is a training step.

        Returns:
            ``None`` if the step does without some boundary, so that a later one has to show the stages.
        """
        module = stage.session.module
        trace = self._trace(stage, call, batch, training=training)
        if trace is None:
            return None
        placement = self._placed(stage, trace, batch)
        if self._grid.is_last and self._grid.replica == 0:
            rank_zero_info(f"The stages on {len(self._grid.ranks)} processes:\n{self._described(placement, module)}")
        stage.status.name = placement.name(self._grid.position, self._grid.rank)
        names = [placement.name(place_, rank) for place_, rank in enumerate(self._grid.ranks)]
        for link, neighbour in ((self._chain.upstream, -1), (self._chain.downstream, 1)):
            if link is not None:
                link.neighbour = names[self._grid.position + neighbour]
        return self._program(stage, placement, training=training)

    def next_program(
        self, stage: Stage, program: StageProgram, call: Callable[..., Any], batch: Any
    ) -> StageProgram | None:
        """Traces the first training step after steps of evaluation: it may use more parameters.

        Returns:
            ``None`` if it does not run the network.
        """
        trace = self._trace(stage, call, batch, training=True)
        if trace is None:
            return None
        placement = assign(program.placement, stage.session.module, trace, tied=self._options.tied)
        return self._program(stage, placement, training=True)

    def explained(self, error: WithoutDataError, stage: Stage, call: Callable[..., Any]) -> WithoutDataError:
        """The same error with the parameters that are to blame, as far as another trace of the step shows them."""
        session, here, placement = stage.session, self._grid.position, self._ownership.placement
        if placement is None:
            return error
        try:
            with stage.randomness:
                trace = trace_step(session.module, session.boundaries.sites, call, self._grid.device)
        except Exception:  # there is an error to report already
            return error
        names = {
            name: placement.name(placement.owner[name], self._grid.ranks[placement.owner[name]])
            for name, stages in trace.uses.items()
            if name in placement.owner
            and not placement.holds(here, name)
            and any(placement.process_of(each) == here for each in stages)
        }
        return WithoutDataError(error.what, names)

    # ------------------------------------------------------------------ parts of it

    def _trace(self, stage: Stage, call: Callable[..., Any], batch: Any, *, training: bool) -> Trace | None:
        session = stage.session
        following = Following(session.module, session.boundaries.sites, self._grid.device, batch=batch)
        trace = trace_first_step(following, call, training=training)
        if trace is None:
            return None
        check_cuts(trace, split=True)
        if training:
            sites, device = session.boundaries.sites, self._grid.device
            check_trainable(session.module, trace, lambda: trains_later(session.module, sites, call, device))
            check_gradients(session.module, trace, lambda: carries_gradient_later(session.module, sites, call, device))
            session.accept(trace)
        return trace

    def _placed(self, stage: Stage, trace: Trace, batch: Any) -> Placement:
        session, processes = stage.session, len(self._grid.ranks)
        predictors: dict[str, Work] = {}
        if trace.stages > processes:  # else there is nothing to balance
            predictors = session.factory.work(trace, Told(self._cutter.settings.context, trace), batch)
        late = session.factory.late_work(trace)
        placement = place(session.module, trace, processes, predictors, late, tied=self._options.tied)
        first = self._of_first_replica(placement.first)
        if first != placement.first:
            return assign(Placement(placement.order, first), session.module, trace, tied=self._options.tied)
        return placement

    def _of_first_replica(self, choice: Choice) -> Choice:
        """What replica 0 chose by its first batch, which may have other shapes: all replicas are cut alike."""
        first: Choice = self._grid.peers.broadcast(choice, 0)
        return first

    def _described(self, placement: Placement, module: nn.Module) -> str:
        one = placement.describe(module, self._grid.ranks)
        count = self._grid.peers.count
        return one if count == 1 else f"{one}\nand the same in {count - 1} other replica{'s' * (count > 2)}"

    def _program(self, stage: Stage, placement: Placement, *, training: bool) -> StageProgram:
        module, grid = stage.session.module, self._grid
        resumed = module.trainer.global_step > 0
        self._ownership.placement = placement = with_averages(placement, module, resumed=resumed)
        elsewhere = placement.elsewhere(grid.position)
        with torch.inference_mode(False):  # what a validation step moves is trained later
            self._settle_in(module, elsewhere)
            fakes = FakeTensors(module, elsewhere, grid.device, trainable=False)
            cuts = {site.name for site in stage.session.boundaries.sites}
            outputs = FakeOutputs(remote_blocks(module, elsewhere, cuts))
            data_parallel = self._data_parallel(module, placement)
        self._share_buffers(module, placement)
        tied: SharedWeights = NoTiedWeights()
        if training and placement.tied:
            self._check_tied(stage.session)
            tied = TiedWeights(module, placement, grid, stage.status)
        averages = self._grid.peers.count == 1 or self._finds_unused
        first_uses = FirstUses(module, self._ownership, grid, stage.status, fakes, averages=averages)
        inlet = self._inlet(stage, placement, first_uses)
        return StageProgram(
            placement,
            inlet,
            self._outlet(stage, placement, inlet),
            fakes,
            outputs,
            data_parallel,
            tied,
            SharedBuffers(module, placement.shared),
            first_uses,
        )

    def _inlet(self, stage: Stage, placement: Placement, first_uses: FirstUses) -> Inlet:
        upstream, boundary = self._chain.upstream, placement.receives_at(self._grid.position)
        if upstream is None or boundary is None:
            return NoInlet()
        return UpstreamInlet(boundary, boundary == placement.order[-1], upstream, stage, self._options.wire, first_uses)

    def _outlet(self, stage: Stage, placement: Placement, inlet: Inlet) -> Outlet:
        downstream, boundary = self._chain.downstream, placement.sends_at(self._grid.position)
        if downstream is None or boundary is None:
            return NoOutlet()
        channel = AnswerChannel(boundary, downstream, stage.status, stage.stopping, stage.profiler.profile)
        is_exact, device_type = boundary == placement.order[-1], self._grid.device.type
        targets = RemoteTargets(channel, inlet, stage.session, is_exact=is_exact, device_type=device_type)
        return DownstreamOutlet(boundary, stage.session.trainers[boundary], channel, targets)

    def _settle_in(self, module: nn.Module, elsewhere: set[str]) -> None:
        """Brings the tensors of this process's stages to its device, and lets go of those of others there."""
        for name, parameter in module.named_parameters():
            if name not in elsewhere:
                self._pages.keep(parameter)
        self._pages.let_go()
        if self._grid.device.type != "cpu":
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            for name, tensor in tensors.items():
                if not self._pages.holds(tensor):
                    tensor.data = tensor.data.to("cpu" if name in elsewhere else self._grid.device)

    def _data_parallel(self, module: nn.Module, placement: Placement) -> DataParallel:
        if self._grid.peers.count == 1:
            return NoReplicas()
        # Without that option DistributedDataParallel refuses parameters that get no gradient.
        which = placement.holds if self._finds_unused else placement.surely_trains
        holds = partial(which, self._grid.position)
        return ReplicatedStages(module, holds, self._grid.peers, self._options.ddp or {})

    @property
    def _finds_unused(self) -> bool:
        return bool((self._options.ddp or {}).get("find_unused_parameters"))

    def _share_buffers(self, module: nn.Module, placement: Placement) -> None:
        """Gives buffers that several processes use the last one's values: without a seed each has made its own."""
        if not placement.shared or self._chain.history.rejoined:  # the same on every process, or done long ago
            return
        buffers, last = dict(module.named_buffers()), len(self._grid.ranks) - 1
        copy = self._chain.copies("sharing buffers", sorted(placement.shared))
        for name in sorted(placement.shared):
            buffer = buffers[name]
            values = copy(name, last, lambda buffer=buffer: buffer.detach().cpu().clone())  # type: ignore[misc]
            with torch.no_grad():
                buffer.copy_(values)

    def _check_tied(self, session: Session) -> None:
        """Raises for options that synchronized tied weights do not support."""
        waits = may_wait(self._cutter.settings, session.trainers.values())
        if session.exact.applies_late:
            what = "late gradients (LateGradients, ExactGradients(correction=...), DelayedGradient)"
        elif waits and not session.module.automatic_optimization:
            what = "manual optimization where the true gradient is waited for (warm_up, TrueGradient, 'couple')"
        else:
            return
        raise SyntheticGradientsError(f"tied_weights='synchronize' does not go with {what}.")


__all__ = ["Cutter", "SplitOptions", "StartUp"]
