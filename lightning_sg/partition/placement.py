"""Which stages a process holds, and which parameters and buffers belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_sg.errors import PartitionError
from lightning_sg.partition.balance import balance
from lightning_sg.partition.checks import between
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.work import Work, work_of_update


@dataclass(frozen=True)
class Placement:
    """The stages on the processes.

    Processes are numbered in the order of the data, from 0 for the first stage: by their positions, not their ranks.

    Attributes:
        order: The boundaries in the order of the data.
        first: For each process, the number of its first stage.
        owner: For the name of each parameter and buffer, the process that holds it. :func:`assign` fills this and what
            follows.
        shared: Buffers that several processes use; each process keeps a copy.
        tied: Where that is allowed, parameters that several processes use, each with these processes. The last of them
            is the owner.
        unused: What no traced step has used. Every process keeps it until a stage uses it, and the last one owns it.
        averages: Copies of parts of the model that no traced step has used: each belongs where its original is.
    """

    order: list[str]
    first: list[int]
    owner: Mapping[str, int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    tied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    averages: frozenset[str] = frozenset()

    @property
    def processes(self) -> int:
        """The number of processes that share the stages."""
        return len(self.first)

    def process_of(self, stage: int) -> int:
        """The process that holds ``stage``."""
        return max(process for process, first in enumerate(self.first) if first <= stage)

    def sends_at(self, process: int) -> str | None:
        """The boundary after a process's last stage; ``None`` for the last process."""
        return self.order[self.first[process + 1] - 1] if process + 1 < self.processes else None

    def receives_at(self, process: int) -> str | None:
        """The boundary before a process's first stage; ``None`` for the first process."""
        return self.order[self.first[process] - 1] if process else None

    def predictor_process(self, boundary: str) -> int:
        """The process that holds the predictor of ``boundary``: that of the stage before it."""
        return self.process_of(self.order.index(boundary))

    def name(self, process: int, rank: int) -> str:
        """Names a process for messages: "stage 1 (rank 0)" or "stages 2-3 (rank 1)"."""
        end = self.first[process + 1] if process + 1 < self.processes else len(self.order) + 1
        start = self.first[process]
        stages = f"stage {start}" if end == start + 1 else f"stages {start}-{end - 1}"
        return f"{stages} (rank {rank})"

    def describe(self, module: nn.Module, ranks: Sequence[int]) -> str:
        """Describes each process in a line: its stages, their boundaries and how many parameters they have."""
        lines = []
        for process, rank in enumerate(ranks):
            count = sum(p.numel() for name, p in module.named_parameters() if self.owner.get(name) == process)
            start = "from the start" if process == 0 else f"after '{self.receives_at(process)}'"
            end = self.sends_at(process)
            where = f"{start} to the loss" if end is None else f"{start} up to '{end}'"
            lines.append(f"{self.name(process, rank)}: {where}, {count:,} parameters")
        return "\n".join(lines)

    def elsewhere(self, process: int) -> set[str]:
        """The names of the parameters and buffers that only other processes hold."""
        return {name for name in self.owner if not self.holds(process, name)}

    def trains(self, process: int, name: str) -> bool:
        """Whether a process trains the parameter, or saves the buffer, called ``name``."""
        return self.owner.get(name) == process or process in self.tied.get(name, ())

    def holds(self, process: int, name: str) -> bool:
        """Whether a process has the parameter or buffer called ``name``: it trains it, or may yet come to do so."""
        return name in self.unused or self.trains(process, name)

    def surely_trains(self, process: int, name: str) -> bool:
        """Whether a process trains the parameter at every batch, as far as it is known."""
        return name not in self.unused and self.trains(process, name)

    def used(self, name: str, process: int) -> Placement:
        """The placement in which a process owns what no traced step has used."""
        return replace(self, owner={**self.owner, name: process}, unused=self.unused - {name})


def place(
    module: nn.Module,
    trace: Trace,
    processes: int,
    *added: Mapping[str, Work],
    tied: bool = False,
) -> Placement:
    """Gives each process neighbouring stages, so that the slowest process is as fast as possible.

    A stage costs what :func:`stage_costs` says, plus all that is added at its end.

    Args:
        module: The model.
        trace: A traced step.
        processes: The number of processes.
        *added: The work that boundaries add to the stages before them, for a batch: predictors, late gradients.
        tied: Whether several processes may use one parameter.

    Raises:
        PartitionError: If there are fewer stages than processes, or several processes use one parameter without
            ``tied``.
    """
    stages = trace.stages
    if stages < processes:
        raise too_few_stages(stages, processes)
    costs = stage_costs(module, trace)
    for stage, name in enumerate(trace.order):
        costs[stage] += sum(each[name].on(trace.device) for each in added if name in each)
    return assign(Placement(list(trace.order), balance(costs, processes)), module, trace, tied=tied)


def assign(placement: Placement, module: nn.Module, trace: Trace, *, tied: bool = False) -> Placement:
    """Assigns each parameter and buffer to the process that uses it.

    What the trace does not use stays where ``placement`` has it. If that is nowhere, it is noted as unused, and the
    last process owns it.

    Args:
        placement: The stages on the processes.
        module: The model.
        trace: A traced step.
        tied: Whether several processes may use one parameter.

    Returns:
        The placement with its owners.

    Raises:
        PartitionError: If several processes use one parameter without ``tied``.
    """
    owner, shared, copies = dict(placement.owner), set(placement.shared), dict(placement.tied)
    unused: set[str] = set()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name in [*parameters, *buffers]:
        users = sorted({placement.process_of(stage) for stage in trace.uses.get(name, set())})
        if not users:
            if name in placement.unused or name not in {*owner, *shared}:
                unused.add(name)
            owner.setdefault(name, placement.processes - 1)
        elif len(users) == 1:
            owner[name] = users[0]
        elif name in buffers:
            shared.add(name)
        elif tied:
            owner[name], copies[name] = users[-1], tuple(users)
        else:
            raise _used_by_several(module, trace, name)
    for name, original in _second_names(module).items():
        owner[name] = owner[original]
        if original in copies:
            copies[name] = copies[original]
        if original in unused:
            unused.add(name)
    for name in shared:
        owner.pop(name, None)
    return replace(placement, owner=owner, shared=frozenset(shared), tied=copies, unused=frozenset(unused))


_OF_AVERAGES = (
    " If the step reads it only to update an average of the weights (EMA, a mean teacher, a momentum encoder), update "
    "that in a hook, such as on_train_batch_end; an average that the step itself runs needs its original in its own "
    "process."
)


def _used_by_several(module: nn.Module, trace: Trace, name: str) -> PartitionError:
    others = [second for second, original in _second_names(module).items() if original == name]
    aliases = f" (also named {others})" if others else ""
    stages = sorted(trace.uses[name])
    return PartitionError(
        f"Parameter '{name}'{aliases} is used by {between(trace.order, stages[0])} and by "
        f"{between(trace.order, stages[-1])}, which are on different processes. A tied parameter needs all "
        "its uses in one process: move a boundary, use fewer processes, or untie it. "
        "SyntheticGradientStrategy(tied_weights='synchronize') keeps its copies equal, but then stages wait for each "
        f"other in every step.{'' if others else _OF_AVERAGES}"
    )


def _second_names(module: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, each with the first name."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def too_few_stages(stages: int, processes: int) -> PartitionError:
    """The error for more processes than stages."""
    return PartitionError(
        f"{processes} processes but only {stages} stage{'s' * (stages != 1)}: a model with {stages - 1} boundaries "
        f"splits over at most {stages} devices. Use Trainer(devices={stages}), or add boundaries: "
        "`lightning_sg.Boundary()` in the model, or SyntheticGradients(boundaries=[...]) with module names."
    )


def stage_costs(module: nn.Module, trace: Trace) -> list[float]:
    """The cost of a training step of each stage, without its predictors: the operations that take as long.

    Args:
        module: The model.
        trace: A traced step.
    """
    trained = [0.0] * trace.stages
    for name, parameter in module.named_parameters():
        for stage in trace.uses.get(name, ()):
            trained[stage] += parameter.numel() * parameter.requires_grad
    # At least one, for stages that cost nothing to be spread evenly.
    return [1 + (work.step + work_of_update(count)).on(trace.device) for work, count in zip(trace.work, trained)]


__all__ = ["Placement", "assign", "place", "stage_costs", "too_few_stages"]
