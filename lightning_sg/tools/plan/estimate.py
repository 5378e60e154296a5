"""Estimates a split from one training step on fake tensors: the stages, their cost, and what crosses between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_sg.arguments import check_fields, checked, instance, number, optional, whole
from lightning_sg.automatic import choose_names
from lightning_sg.boundary import Boundaries
from lightning_sg.callback import SyntheticGradients
from lightning_sg.lightning_api import pl
from lightning_sg.partition.checks import check_cuts, check_gradients, check_trainable
from lightning_sg.partition.placement import place, stage_costs
from lightning_sg.partition.step import call_training_step, trace_step
from lightning_sg.partition.told import Told
from lightning_sg.time_boundary import boundaries_in_time


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        parameters: The number of parameters that it uses.
        flops: Floating-point operations of its forward pass on the batch.
        cost: Estimated cost of a training step, forward, backward and optimizer: the floating-point operations that
            take as long. What is read and written counts, too.
        process: The process that holds it; process 0 holds the first stage.
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
        bytes: The size of the activations that cross it for the batch. Targets of the same size come back for each
            batch that the predictor learns from.
        predictor: A description of the predictor.
        cost: What the predictor costs for the batch, predicting and learning, counted as that of a stage.
        between_processes: Whether the stages beside it are on different processes.
        late: What late gradients cost the stage before it, for a batch on average, counted in the same way.
        flops: The predictor's floating-point operations alone.
    """

    name: str
    bytes: int
    predictor: str
    cost: float
    between_processes: bool
    late: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Overhead:
    """What a step costs besides the operations of the model and its predictors: Lightning's own work, data, sending.

    ``lightning_sg.advise`` and ``lightning-sg advise`` measure it. Both are shares of the time for which a plain
    step computes.

    Attributes:
        plain: That of a step of plain backpropagation in one process.
        split: That of a step of one process among several.
    """

    plain: float = 0.0
    split: float = 0.0

    def __post_init__(self) -> None:
        """Checks both."""
        check_fields("Overhead", self, plain=number(least=0), split=number(least=0))

    def __str__(self) -> str:
        """As the option of ``lightning-sg plan``."""
        return f"{self.plain:.2f} {self.split:.2f}"


@dataclass(frozen=True)
class Plan:
    """A split of a model.

    Attributes:
        stages: The stages, in the order in which data passes them.
        boundaries: The boundaries between them: ``boundaries[i]`` ends ``stages[i]``.
        processes: The number of processes.
        overhead: What a step costs besides, as measured; nothing by default.
    """

    stages: list[StagePlan]
    boundaries: list[BoundaryPlan]
    processes: int
    overhead: Overhead = Overhead()

    @property
    def model_cost(self) -> float:
        """The cost of all stages without predictors: plain backpropagation in one process."""
        return sum(stage.cost for stage in self.stages)

    @property
    def loads(self) -> list[float]:
        """The cost of each process: its stages, their late gradients, and the predictors at their ends."""
        loads = [0.0] * self.processes
        for stage in self.stages:
            loads[stage.process] += stage.cost
        for stage, boundary in zip(self.stages, self.boundaries):
            loads[stage.process] += boundary.cost + boundary.late
        return loads

    def rank(self, process: int) -> int:
        """The global rank of a process in the first replica, as a run calls it: the last stage is on rank 0."""
        return self.processes - 1 - process

    @property
    def bottleneck(self) -> int:
        """The process with the largest load; the others wait for it."""
        return max(range(self.processes), key=self.loads.__getitem__)

    @property
    def speedup(self) -> float:
        """The speed-up over plain backpropagation in one process; without an overhead, it is an upper bound."""
        return (1 + self.overhead.plain) / (max(self.loads) / self.model_cost + self.overhead.split)


def plan(
    module: pl.LightningModule,
    batch: Any,
    callback: SyntheticGradients | None = None,
    processes: int = 1,
    overhead: Overhead = Overhead(),
) -> Plan:
    """Plans a split without training anything.

    Args:
        module: The model; its ``training_step`` runs once, on fake tensors.
        batch: A training batch.
        callback: Gives the boundaries and the predictors; by default every ``Boundary`` and the default predictor.
        processes: The number of processes to spread the stages over.
        overhead: What a step costs besides operations, as ``advise`` measures it. With it, the speed-up is what to
            expect of this cut on the machine that it was measured on; without it, what no machine exceeds.

    Returns:
        The plan.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``processes`` is out of range.
        BoundaryError: If a boundary is unknown, never reached, or bypassed by data, or no gradient flows back.
        PartitionError: If the step cannot run on fake tensors, or there are more processes than stages.
        SyntheticGradientsError: If a predictor does not fit its boundary, or is given for a boundary that does not
            exist.
    """
    callback = checked("plan", "callback", callback, optional(instance(SyntheticGradients)))
    processes = checked("plan", "processes", processes, whole(1, 100_000))
    overhead = checked("plan", "overhead", overhead, instance(Overhead))
    settings = (callback or SyntheticGradients()).settings
    run, device = partial(call_training_step, module, batch, 0), torch.device("cpu")
    names = settings.names
    if settings.automatic:
        names = choose_names(settings, module, processes, run, device, batch)
    boundaries = Boundaries(module, names)
    try:
        trace = trace_step(module, boundaries.sites, run, device, batch=batch)
    finally:
        boundaries.remove()
    check_cuts(trace, split=processes > 1)
    check_trainable(module, trace)
    check_gradients(module, trace)
    told = Told(settings.context, trace)
    in_time = list(boundaries_in_time(module))
    factory = settings.factory(in_time)
    predictors, late = factory.costs(trace, told, batch), factory.late_work(trace)
    placement = place(module, trace, processes, {name: work for name, (_words, work) in predictors.items()}, late)
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
            predictors[name][0],
            predictors[name][1].on(trace.device),
            placement.process_of(stage) != placement.process_of(stage + 1),
            late[name].on(trace.device) if name in late else 0.0,
            predictors[name][1].flops,
        )
        for stage, name in enumerate(trace.order)
    ]
    return Plan(stages, cuts, processes, overhead)


__all__ = ["BoundaryPlan", "Overhead", "Plan", "StagePlan", "plan"]
