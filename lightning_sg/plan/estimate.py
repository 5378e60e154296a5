"""Stages, what they cost and what passes between them, from one step on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_sg.boundary import Boundaries
from lightning_sg.callback import SyntheticGradients
from lightning_sg.context import context_of
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.partition.checks import check_cuts, check_trainable
from lightning_sg.partition.placement import Placement, place, stage_costs
from lightning_sg.partition.trace import Trace, call_training_step, trace_step
from lightning_sg.predictors import GradientPredictor
from lightning_sg.training.cost import OperationCounter
from lightning_sg.training.learner import Learner


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        parameters: How many it uses.
        flops: Floating-point operations of its forward pass on the batch.
        cost: Of a training step, in floating-point operations: forward, backward and the optimizer, estimated.
        process: The place in the chain of the process that holds it.
    """

    parameters: int
    flops: int
    cost: float
    process: int


@dataclass(frozen=True)
class BoundaryPlan:
    """One boundary.

    Attributes:
        name: Its name.
        bytes: What crosses it for the batch. Targets of the same size come back where they are learned from.
        predictor: What predicts there, in words.
        cost: Floating-point operations of predicting and learning for the batch.
        between_processes: Whether the stages beside it are on different processes.
    """

    name: str
    bytes: int
    predictor: str
    cost: float
    between_processes: bool


@dataclass(frozen=True)
class Plan:
    """A split of a model.

    Attributes:
        stages: In the order of the data.
        boundaries: Between them.
        processes: How many processes.
    """

    stages: list[StagePlan]
    boundaries: list[BoundaryPlan]
    processes: int

    @property
    def loads(self) -> list[float]:
        """The cost of each process: of its stages, and of the predictors at their ends."""
        loads = [0.0] * self.processes
        for stage in self.stages:
            loads[stage.process] += stage.cost
        for stage, boundary in zip(self.stages, self.boundaries):
            loads[stage.process] += boundary.cost
        return loads

    @property
    def bottleneck(self) -> int:
        """The process that the others will wait for."""
        return max(range(self.processes), key=self.loads.__getitem__)

    @property
    def speedup(self) -> float:
        """At most how much faster than plain backpropagation in one process, if operations were all that takes time."""
        return sum(stage.cost for stage in self.stages) / max(self.loads)


def plan(
    module: pl.LightningModule, batch: Any, callback: SyntheticGradients | None = None, processes: int = 1
) -> Plan:
    """Plans a split, without training anything.

    Args:
        module: The model; its ``training_step`` is followed once on tensors without data.
        batch: A training batch.
        callback: Names the boundaries and the predictors; by default every ``Boundary`` and the default predictor.
        processes: How many processes the stages are to be spread over.

    Returns:
        The plan.

    Raises:
        BoundaryError: If a boundary is unknown, not reached, or gone around.
        PartitionError: If the step cannot be followed, or there are more processes than stages.
        SyntheticGradientsError: If a predictor does not fit, or predictors are given for other boundaries.
    """
    callback = callback or SyntheticGradients()
    boundaries = Boundaries(module, callback.names)
    try:
        run = partial(call_training_step, module, batch, 0)
        trace = trace_step(module, boundaries.sites, run, torch.device("cpu"))
    finally:
        boundaries.remove()
    check_cuts(trace, split=processes > 1)
    check_trainable(module, trace)
    placement = place(module, trace, processes)
    sizes = dict(module.named_parameters())
    stages = [
        StagePlan(
            sum(sizes[name].numel() for name, users in trace.uses.items() if stage in users and name in sizes),
            trace.flops[stage],
            cost,
            placement.process_of(stage),
        )
        for stage, cost in enumerate(stage_costs(module, trace))
    ]
    context = context_of(batch, callback.context)
    templates = callback.templates(trace.order)
    cuts = [_boundary(name, templates[name], trace, placement, callback, context) for name in trace.order]
    return Plan(stages, cuts, processes)


def _boundary(
    name: str,
    template: GradientPredictor,
    trace: Trace,
    placement: Placement,
    callback: SyntheticGradients,
    context: Any,
) -> BoundaryPlan:
    stage = trace.order.index(name)
    parted = placement.process_of(stage) != placement.process_of(stage + 1)
    if template.exact:
        return BoundaryPlan(name, trace.bytes[name], type(template).__name__, 0.0, parted)
    activations = tuple(torch.randn(shape) for shape in trace.shapes[name])
    learner = Learner(template, None)
    try:
        learner.build(activations, context, trace.loss)
    except ValueError as error:
        raise SyntheticGradientsError(f"{type(template).__name__} at boundary '{name}': {error}") from error
    predictor = learner.predictor
    with OperationCounter() as predicting:
        learner.predict(activations, context)

    def learning(targets: tuple[torch.Tensor, ...]) -> float:
        with OperationCounter() as counter:
            if learner.learns:
                learner.learn(activations, context, targets)
        return float(counter.flops)

    last = stage == len(trace.order) - 1
    if not predictor.needs_target:
        learned = learning(())
    elif last or not predictor.learns_without_target:
        learned = learning(activations)
    else:  # of the target only where it is exact
        sent = callback.exact_every > 0 and template.wants_exact(trace.shapes[name], context)
        share = 1 / callback.exact_every if sent else 0.0
        learned = share * learning(activations) + (1 - share) * learning(())
    words = str(getattr(predictor, "choice", type(predictor).__name__))
    cost = predicting.flops + learned / callback.train_every
    return BoundaryPlan(name, trace.bytes[name], words, cost, parted)


__all__ = ["BoundaryPlan", "Plan", "StagePlan", "plan"]
