"""Predictors, exact gradients and the current batch of one module; what the callback's hooks act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sg.blackbox.boxes import ScoredBoundaries
from lightning_sg.blackbox.learning import ScoredOptions
from lightning_sg.boundary import Boundaries, Boundary
from lightning_sg.context_log import announce_context
from lightning_sg.crossings.base import BatchContext
from lightning_sg.crossings.exact_pass import ExactPass, Parameters, without_overflow
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.crossings.policy import ExactPolicy
from lightning_sg.crossings.replays import Replays
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.each_crossing import EachCrossing, crossed
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.finite.diagnosis import BatchOrigin
from lightning_sg.finite.policy import IgnoresNonFinite, RaisesNonFinite
from lightning_sg.finite.skipping import SkipsNonFinite
from lightning_sg.inputs.boundaries import InputBoundaries
from lightning_sg.inputs.record import ActivationsAtHand
from lightning_sg.lightning_api import pl
from lightning_sg.ownership import Ownership, OwnsAll
from lightning_sg.partition.late import LateLayers
from lightning_sg.partition.told import Told
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.watch import GradientWatch
from lightning_sg.plain import plain
from lightning_sg.predictors.layout import Layout
from lightning_sg.predictors.stage_size import StageSize
from lightning_sg.recurrent.auxiliary import auxiliary_of
from lightning_sg.recurrent.boundaries import TimeCrossings
from lightning_sg.settings import Settings
from lightning_sg.time_boundary import TimeBoundary, boundaries_in_time
from lightning_sg.training.base import BoundaryTrainer, Profile
from lightning_sg.training.record import Applied
from lightning_sg.training.resumed import warn_of_differences
from lightning_sg.training.targets import TargetsOfBackwardPass
from lightning_sg.training.updates import RandomUpdates
from lightning_sg.watched import WatchedTraining


class Session:
    """The decoupled training of one module.

    It lives as long as the module is trained, over several calls of ``fit``; what belongs to a batch is in
    :attr:`batch`.

    Attributes:
        settings: What the user said.
        module: The module.
        boundaries: Its boundaries between stages, while they are installed.
        ownership: What of it all is this process's.
        trainers: What supplies the gradient at each boundary between stages.
        times: The boundaries in time.
        boxes: The boundaries that nothing can be differentiated behind.
        inputs: The input predictors.
        updates: Which stages are updated at a step.
        exact: When exact gradients travel, and what they are applied to.
        replays: The batches that stages run again when their exact gradients have come.
        trace: What a traced training step showed, once there was one.
        told: What predictors are told of a batch.
        flow: Notices boundaries through which gradients no longer flow.
        late: Adds layers to the trace that only later batches go through.
        batches: How many training batches there were.
        batch: The training batch that is going on, or ``None`` between two.
        finite: What is done about batches that are not finite.
        watched: What that goes by.

    Args:
        settings: What the user said.
        module: The module.
        names: Names of submodules to cut after; ``None`` for every ``Boundary`` in the module.
        seed: Seeds the predictors' initial weights.
        ownership: What is this process's.
        profile: Shows actions to the trainer's profiler.

    Raises:
        BoundaryError: If a name is unknown or given twice.
        SyntheticGradientsError: If predictors are given by name, but for other boundaries, or options do not go
            together.
    """

    def __init__(
        self,
        settings: Settings,
        module: pl.LightningModule,
        names: Sequence[str] | None,
        seed: int,
        ownership: Ownership | None = None,
        profile: Profile = nullcontext,
    ) -> None:
        self.module = module
        self.boundaries = Boundaries(module, names)
        self.ownership = ownership or OwnsAll()
        self.trace: Trace | None = None
        self.told = Told(settings.context, None)
        self.flow = GradientWatch(module)
        self.late = LateLayers(module, self._accept_late)
        self.batches = 0
        self.batch: BatchContext | None = None
        self.settings = settings
        in_time = boundaries_in_time(module)
        between = [site.name for site in self.boundaries.sites]
        if in_time and between and settings.through_time.trace_decay:
            raise SyntheticGradientsError(
                f"ThroughTime(trace_decay=...) with boundaries between stages too ({between}): how the state of a "
                "chunk depends on the one before cannot be found through them. Use trace_decay=0."
            )
        self.factory = settings.factory(list(in_time))
        carried = [name for name, cut in in_time.items() if isinstance(cut, TimeBoundary)]
        trainers = self.factory.make(between, carried, settings.trainer_options(seed, self.ownership.replicas))
        self.trainers = {name: trainers[name] for name in between}
        self.exact = ExactPolicy(settings.exact, settings.late, module, self.trainers, self.ownership.replicas)
        self.replays = Replays(module, self.exact)
        self.replays.refuse(settings.late)
        self.inputs = InputBoundaries(settings.inputs, settings.delay)
        self.inputs.install(between, seed, self.ownership.replicas)
        self.updates = RandomUpdates(settings.training.update_probability)
        self.updates.start(seed)
        if not self.updates.certain and self.exact.applies_late:
            raise SyntheticGradientsError(
                "PredictorTraining(update_probability=...) does not go with DelayedGradient and LateGradients: a stage "
                "that was not updated with a batch would be updated with it late. Use update_probability=1."
            )
        self.times = TimeCrossings()
        auxiliary = partial(auxiliary_of, settings.through_time, settings.training, self.ownership.replicas, seed)
        self.times.attach(module, trainers, auxiliary, settings.through_time)
        scored = ScoredOptions(
            settings.delay, settings.training, seed, self.ownership.replicas, settings.on_non_finite == "skip"
        )
        self.boxes = ScoredBoundaries(module, scored, settings.context, automatic=settings.automatic)
        self.watched = WatchedTraining(module, between, lambda: self.ownership, lambda: self.batch)
        self.finite = self._make_finite()
        self._show_to(profile)

    def _make_finite(self) -> IgnoresNonFinite:
        """What is done about batches that are not finite; without a boundary nothing is changed."""
        wish = self.settings.on_non_finite if self.all_trainers else "ignore"
        if wish == "skip" and self.times.trainers:
            raise SyntheticGradientsError(
                "SyntheticGradients(on_non_finite='skip') does not go with boundaries in time "
                f"({list(self.times.trainers)}): the state that a batch leaves would be carried on. Use 'raise'."
            )
        if wish == "skip":
            return SkipsNonFinite(self.watched)
        return IgnoresNonFinite() if wish == "ignore" else RaisesNonFinite(self.watched)

    # ------------------------------------------------------------------ a run

    @property
    def all_trainers(self) -> dict[str, BoundaryTrainer]:
        """What supplies the gradients at all boundaries, between stages and in time."""
        return {**self.trainers, **self.times.trainers}

    @property
    def decouples(self) -> bool:
        """Whether there is any boundary: between stages, in time, or with scores."""
        return bool(self.all_trainers or self.boxes.trainers)

    def fits(self, module: pl.LightningModule, names: Sequence[str] | None) -> bool:
        """Whether this is the session of a module with these boundaries."""
        if names is None:
            names = [name for name, child in module.named_modules() if isinstance(child, Boundary)]
        return self.module is module and list(self.all_trainers) == [*names, *boundaries_in_time(module)]

    def install(self, names: Sequence[str] | None, ownership: Ownership, profile: Profile) -> None:
        """Cuts the module for another run, perhaps on other processes; what was learned stays.

        Args:
            names: As when the session was made.
            ownership: What is this process's.
            profile: Shows actions to the trainer's profiler.
        """
        self.remove()
        self.ownership = ownership
        for trainer in self.trainers.values():
            trainer.targets = TargetsOfBackwardPass()
        for inputs in self.inputs.trainers.values():
            inputs.source = ActivationsAtHand()
        self.boundaries = Boundaries(self.module, names)
        self.trace, self.told = None, Told(self.settings.context, None)
        self.times.install()
        self.boxes.install()
        self._show_to(profile)

    def _show_to(self, profile: Profile) -> None:
        for trainer in self.all_trainers.values():
            trainer.profile = profile
            trainer.inquire = self.watched.cause_before
        for inputs in self.inputs.trainers.values():
            inputs.inquire = self.watched.cause_before
        self.inputs.show_to(profile)
        self.boxes.show_to(profile)

    def remove(self) -> None:
        """Leaves the module as it was: without hooks, an ordinary module."""
        self._drop_batch()
        self.times.remove()
        self.boxes.remove()
        self.boundaries.remove()
        self.late.remove()

    def accept(self, trace: Trace) -> None:
        """Takes what a traced training step showed about the model."""
        self.trace = self.watched.trace = trace
        self.told = Told(self.settings.context, trace)
        self.finite.accept(trace)
        self.updates.accept(trace.order, trace.uses, len(self.trainers))
        self.exact.accept(trace)
        order = trace.order or list(self.trainers)
        for place, name in enumerate(order):
            each = self.trainers[name]
            each.distance = len(order) - place
            each.shapes, each.layout = trace.shapes.get(name, []), trace.layouts.get(name, Layout())
            each.stage = trace.size_of(place) if trace.order else StageSize.of_equal_share(self.module, len(order) + 1)
        self.late.watch(trace, self.boundaries.sites)
        if self.batch is not None:
            self.batch.context, self.batch.loss = self.told.of(self.batch.origin.data, self.batches), self.told.loss
            self.batch.plan = self.exact.plan(self.batches, self.batch.context)
            self.replays.begin(self.batch)
            announce_context(self.told, self.trainers.values(), found=self.batch.context is not None)

    def _accept_late(self) -> None:
        """Takes what a later batch showed about layers that the traced step did not go through."""
        assert self.trace is not None
        self.finite.accept(self.trace)
        self.updates.accept(self.trace.order, self.trace.uses, len(self.trainers))

    # ------------------------------------------------------------------ one batch

    def begin_batch(self, trainer: pl.Trainer, batch: Any, origin: BatchOrigin) -> BatchContext:
        """A training batch begins."""
        context = self.told.of(batch, self.batches)
        self.exact.begin(self.batches, trainer.optimizers)
        self.batch = BatchContext(
            self.batches,
            context,
            GradientScale.of(trainer),
            self.told.loss,
            self.exact.plan(self.batches, context),
            self.inputs.features(batch),
            origin=origin,
            finite=self.finite,
        )
        self.replays.begin(self.batch)
        self.updates.begin(trainer.global_step)
        self.finite.begin()
        return self.batch

    @property
    def current(self) -> BatchContext:
        """The training batch that is going on."""
        if self.batch is None:
            raise AssertionError("no training batch is going on")
        return self.batch

    def take_over(self, batch: BatchContext, trainer: pl.Trainer) -> None:
        """Goes on with a batch that began before the module was cut."""
        plan = self.exact.plan(self.batches, batch.context)
        self.batch = BatchContext(
            self.batches,
            batch.context,
            batch.scale,
            plan=plan,
            features=batch.features,
            origin=batch.origin,
            finite=self.finite,
        )
        self.updates.begin(trainer.global_step)
        self.finite.begin()
        self.open_in_time(trainer.strategy.root_device)

    def open_in_time(self, device: torch.device) -> None:
        """Opens the boundaries in time and with scores for the current batch, which was traced if it is the first."""
        self.times.begin(self.current, device)
        self.boxes.begin(self.current)

    def crossing(self, boundary: str) -> EachCrossing:
        """What happens in the current batch at a boundary between two stages of this process."""
        inputs = self.inputs.trainers.get(boundary)
        return EachCrossing(self.trainers[boundary], inputs, self.current, self.updates, self.module)

    @property
    def crossed(self) -> list[LocalCrossing]:
        """Those of the current batch's crossings that keep what an exact gradient needs."""
        return crossed(self.batch)

    def before_backward(self, loss: Tensor, leaves: Sequence[Tensor]) -> None:
        """A backward pass is about to begin: finds its exact gradients; the first of a batch predicts in time.

        Args:
            loss: Where it begins.
            leaves: What this process received of the batch from the stage before, and carries a gradient.
        """
        batch = self.batch
        if batch is None:
            return
        self.watched.received = leaves
        self.boxes.check()
        self.finite.before_backward(loss)
        for crossing in () if batch.went_backward else batch.crossings:
            crossing.before_backward(loss)
        if batch.plan.keeps_graph and self.ownership.has_loss and not self.finite.skips_loss():
            applied = self.applied_late(batch.plan.applies)
            batch.exact_pass = ExactPass.run(loss, self.crossed, leaves, applied, batch.scale)
            batch.add_exact(leaves, batch.exact_pass.leaves)
        if not batch.went_backward:
            self.replays.run(batch.number, self.ownership.holds, self.hold_late)
            batch.newest = self.exact.newest(batch.number, self.ownership.holds)
        batch.newest.begin()

    def after_backward(self) -> None:
        """A backward pass is over: holds what is due later. A batch's first learns in time and applies what is due."""
        batch = self.batch
        if batch is None:
            return
        batch.newest.end()
        first, batch.went_backward = not batch.went_backward, True
        exact, batch.exact_pass = batch.exact_pass, None
        for crossing in batch.crossings if first else ():
            crossing.after_backward()
        applies = batch.plan.applies
        found = {} if exact is None else exact.applied(self.applied_late(applies), batch.scale, applies)
        self.finite.leave_out()
        if first or exact is not None:
            found = without_overflow(self.finite.corrections(batch.number, found))
            self.exact.hold(batch.number, found, self.ownership.holds)
        if first:
            self.exact.apply(batch.number, batch.scale, self.ownership.holds)
        self.finite.after_backward()

    def before_optimizer_step(self) -> None:
        """Looks at gradients that came past the hooks; leaves stages out that are not updated at this step."""
        by_hand = not self.module.automatic_optimization
        if by_hand and self.batch is not None and not self.batch.went_backward:  # `loss.backward()`, without Lightning
            self.finite.before_step()
        self.updates.drop(self.module)

    def applied_late(self, applies: Applied) -> Parameters:
        """The parameters of this process's stages that such an exact gradient is applied to, by name."""
        return self.exact.applied(applies, self.ownership.holds)

    def hold_late(self, number: int, gradients: Mapping[str, Tensor]) -> None:
        """Keeps what is to be applied of batch ``number`` until it is due."""
        self.exact.hold(number, self.finite.corrections(number, gradients), self.ownership.holds)

    def pass_by(self) -> None:
        """The current batch crosses no boundary of this process but those that it has crossed."""
        for name, trainer in self.trainers.items():
            if self.ownership.owns(name):
                trainer.pass_by(self.current.plan, self.current.visits[name])

    def end_batch(self) -> None:
        """The training batch is over: counts it, and lets go of what belongs to it.

        Raises:
            BoundaryError: If no gradient has ever flowed back through a boundary to a stage that is to train.
        """
        if self.batch is not None:
            self.boxes.check()
            self.pass_by()
            self.flow.check(self.boundaries.sites, self.trace, self.ownership.owns, self.batches)
            self.finite.end()
            self.replays.run(self.batch.number, self.ownership.holds, self.hold_late)
            self.replays.end(self.batch)
            self.batches += 1
        self._drop_batch()

    def _drop_batch(self) -> None:
        batch, self.batch, self.watched.received = self.batch, None, ()
        if batch is not None:
            batch.newest.end()
            crossings, batch.crossings = batch.crossings, []
            for crossing in crossings:
                crossing.end()
        self.boundaries.close()
        self.boxes.end()

    def check_finite(self) -> None:
        """Asks devices whether what they computed since the last time was finite, which stops them for a moment.

        Raises:
            NonFiniteLossError: If a loss, a gradient or a prediction was not, and no guard repairs it.
        """
        self.finite.check()
        for trainer in self.all_trainers.values():
            trainer.check_finite()
        self.inputs.check_finite()

    def replay_all(self) -> None:
        """Runs again at once what is still to be run again."""
        self.replays.run(None, self.ownership.holds, self.hold_late)

    def collect(self) -> None:
        """Brings in all that is under way to this process's predictors."""
        for name, trainer in self.trainers.items():
            if self.ownership.owns(name):
                trainer.collect()
        for name, inputs in self.inputs.trainers.items():
            if self.ownership.owns_inputs(name):
                inputs.collect()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, gather: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Predictors with their optimizers and the targets under way, by boundary; what is carried in time.

        Args:
            gather: The union of all processes' states by boundary. A collective.
        """
        in_time = self.times.here(split=self.ownership.split)
        owned = [name for name in self.trainers if self.ownership.owns(name)] + in_time
        trainers = self.all_trainers
        state = {
            "batches": self.batches,
            "boundaries": gather({name: {**trainers[name].kinds(), **trainers[name].state_dict()} for name in owned}),
            "corrections": gather(self.exact.state_dict()),
            "times": gather(self.times.state_dict(in_time)),
            "boxes": gather(self.boxes.state_dict(split=self.ownership.split)),
            "inputs": gather(self.inputs.state_dict(self.ownership.owns_inputs)),
            "updates": self.updates.state_dict(),
            "rate": self.exact.rate.state_dict(),
        }
        return dict(plain(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; warns of boundaries that are dropped, start afresh or are set up otherwise."""
        self.batches = state["batches"]
        self.exact.load_state_dict(state["corrections"], state.get("rate", {}))  # earlier versions saved less
        self.inputs.load_state_dict(state.get("inputs", {}))
        self.updates.load_state_dict(state.get("updates", {}))
        self.times.load_state_dict(state.get("times", {}))
        self.boxes.load_state_dict(state.get("boxes", {}))
        trainers = self.all_trainers
        warn_of_differences(state["boundaries"], trainers)
        for name, saved in state["boundaries"].items():
            if name in trainers:
                trainers[name].load_state_dict(saved)


__all__ = ["Session"]
