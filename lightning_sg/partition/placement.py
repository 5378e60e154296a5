"""Which stages a process holds, and which parameters and buffers belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_sg.errors import PartitionError
from lightning_sg.partition.balance import balance
from lightning_sg.partition.checks import between
from lightning_sg.partition.trace import Trace


@dataclass
class Placement:
    """The stages on the processes.

    Attributes:
        order: The boundaries in the order of the data.
        first: For each process of the chain, the number of its first stage.
        owner: For each parameter and buffer name, the process that holds it.
        shared: Buffers that several processes use; each keeps its own.
        tied: Of parameters that several processes use, where that is allowed, these processes; the last is the owner.
    """

    order: list[str]
    first: list[int]
    owner: dict[str, int] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    tied: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """The number of processes in the chain."""
        return len(self.first)

    def process_of(self, stage: int) -> int:
        """The process that holds ``stage``."""
        return max(process for process, first in enumerate(self.first) if first <= stage)

    def sends_at(self, process: int) -> str | None:
        """The boundary at the end of a process's stages; ``None`` for the last process."""
        return self.order[self.first[process + 1] - 1] if process + 1 < self.processes else None

    def receives_at(self, process: int) -> str | None:
        """The boundary at the start of a process's stages; ``None`` for the first process."""
        return self.order[self.first[process] - 1] if process else None

    def predictor_process(self, boundary: str) -> int:
        """The process with the predictor of ``boundary``: that of the stage before it."""
        return self.process_of(self.order.index(boundary))

    def name(self, process: int, rank: int) -> str:
        """A process in words: "stage 1 (rank 0)" or "stages 2-3 (rank 1)"."""
        end = self.first[process + 1] if process + 1 < self.processes else len(self.order) + 1
        start = self.first[process]
        stages = f"stage {start}" if end == start + 1 else f"stages {start}-{end - 1}"
        return f"{stages} (rank {rank})"

    def describe(self, module: nn.Module, ranks: Sequence[int]) -> str:
        """The stages of every process with their boundaries and parameters, a line each."""
        lines = []
        for process, rank in enumerate(ranks):
            count = sum(p.numel() for name, p in module.named_parameters() if self.owner.get(name) == process)
            start = "from the start" if process == 0 else f"after '{self.receives_at(process)}'"
            end = self.sends_at(process)
            where = f"{start} to the loss" if end is None else f"{start} up to '{end}'"
            lines.append(f"{self.name(process, rank)}: {where}, {count:,} parameters")
        return "\n".join(lines)

    def elsewhere(self, process: int) -> set[str]:
        """The names of the parameters and buffers that other processes hold."""
        return {name for name in self.owner if not self.trains(process, name)}

    def trains(self, process: int, name: str) -> bool:
        """Whether a process trains the parameter, or keeps the buffer, of that name."""
        return self.owner.get(name) == process or process in self.tied.get(name, ())


def place(
    module: nn.Module,
    trace: Trace,
    processes: int,
    predictors: Mapping[str, float] | None = None,
    *,
    tied: bool = False,
) -> Placement:
    """Gives each process a run of neighbouring stages so that the slowest is as fast as can be.

    The cost of a stage is its share of the model's operations plus its share of the parameters, which stands for
    the optimizer's work, and the predictor at its end.

    Args:
        module: The model.
        trace: A traced step.
        processes: How many processes there are.
        predictors: The floating-point operations of the predictor at each boundary, for a batch.
        tied: Whether several processes may use a parameter.

    Raises:
        PartitionError: If there are fewer stages than processes, or a parameter is used by two and must not be.
    """
    stages = trace.stages
    if stages < processes:
        raise too_few_stages(stages, processes)
    costs = stage_costs(module, trace)
    for stage, name in enumerate(trace.order):
        costs[stage] += (predictors or {}).get(name, 0.0)
    placement = Placement(list(trace.order), balance(costs, processes))
    assign(placement, module, trace, tied=tied)
    return placement


def assign(placement: Placement, module: nn.Module, trace: Trace, *, tied: bool = False) -> None:
    """Enters each parameter and buffer at the process that uses it; those that no stage uses go to the last.

    Raises:
        PartitionError: If two processes use one parameter, unless ``tied``.
    """
    parameters = dict(module.named_parameters())
    for name, _tensor in [*module.named_parameters(), *module.named_buffers()]:
        users = sorted({placement.process_of(stage) for stage in trace.uses.get(name, set())})
        if len(users) > 1 and name in parameters and tied:
            placement.tied[name] = tuple(users)
            placement.owner[name] = users[-1]
        elif len(users) > 1 and name in parameters:
            first, second = sorted(trace.uses[name])[0], sorted(trace.uses[name])[-1]
            raise PartitionError(
                f"Parameter '{name}'{_aliases(module, name)} is used by {between(trace.order, first)} and by "
                f"{between(trace.order, second)}, which are on different processes. A tied parameter needs all "
                "its uses in one process: move a boundary, use fewer processes, untie it, or have its copies kept in "
                "step, for which stages wait in every step: SyntheticGradientStrategy(tied_weights='synchronize')."
            )
        elif len(users) > 1:
            placement.shared.add(name)
        placement.owner.setdefault(name, users[-1] if users else placement.processes - 1)
        if len(users) == 1:
            placement.owner[name] = users[0]
    for name, _tensor in module.named_parameters(remove_duplicate=False):
        if name not in placement.owner:  # a second name of a tied parameter
            original = next(other for other, value in parameters.items() if value is module.get_parameter(name))
            placement.owner[name] = placement.owner[original]
            if original in placement.tied:
                placement.tied[name] = placement.tied[original]
    for name in placement.shared:
        placement.owner.pop(name, None)


def too_few_stages(stages: int, processes: int) -> PartitionError:
    """The error for more processes than stages."""
    return PartitionError(
        f"{processes} processes but only {stages} stage{'s' * (stages != 1)}: a model with {stages - 1} boundaries "
        f"splits over at most {stages} devices. Use Trainer(devices={stages}), or add boundaries: "
        "`lightning_sg.Boundary()` in the model, or SyntheticGradients(boundaries=[...]) with module names."
    )


def stage_costs(module: nn.Module, trace: Trace) -> list[float]:
    """What a training step of each stage costs, in floating-point operations, without its predictors.

    Args:
        module: The model.
        trace: A traced step.
    """
    operations = [float(flops) for flops in trace.flops]
    weights = [0.0] * trace.stages
    for name, parameter in module.named_parameters():
        for stage in trace.uses.get(name, ()):
            weights[stage] += parameter.numel()
    # Forward and backward take about three times the forward operations; an optimizer about ten for each parameter.
    return [3 * flops + 10 * count + 1 for flops, count in zip(operations, weights)]


def _aliases(module: nn.Module, name: str) -> str:
    parameter = module.get_parameter(name)
    others = [
        other
        for other, value in module.named_parameters(remove_duplicate=False)
        if value is parameter and other != name
    ]
    return f" (also named {others})" if others else ""


__all__ = ["Placement", "assign", "place", "stage_costs", "too_few_stages"]
