"""Stages, what they cost and what passes between them, from one step on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_sg.batch.context import context_of
from lightning_sg.boundary import Boundaries
from lightning_sg.callback import SyntheticGradients
from lightning_sg.partition.checks import check_cuts, check_trainable
from lightning_sg.partition.placement import place, stage_costs
from lightning_sg.partition.trace import call_training_step, trace_step


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
    run, device = partial(call_training_step, module, batch, 0), torch.device("cpu")
    names = callback.names
    if callback.undecided:
        names = callback.choose_boundaries(module, processes, run, device, batch)
    boundaries = Boundaries(module, names)
    try:
        trace = trace_step(module, boundaries.sites, run, device)
    finally:
        boundaries.remove()
    check_cuts(trace, split=processes > 1)
    check_trainable(module, trace)
    context = context_of(batch, callback.context)
    costs = callback.costs_of_predictors(trace, context)
    placement = place(module, trace, processes, {name: cost for name, (_words, cost) in costs.items()})
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
    cuts = [
        BoundaryPlan(
            name,
            trace.bytes[name],
            *costs[name],
            placement.process_of(stage) != placement.process_of(stage + 1),
        )
        for stage, name in enumerate(trace.order)
    ]
    return Plan(stages, cuts, processes)


__all__ = ["BoundaryPlan", "Plan", "StagePlan", "plan"]
