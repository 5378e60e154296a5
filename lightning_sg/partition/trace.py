"""The result of tracing a step: which stage uses which parameter, and what crosses each boundary."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_sg.gradient_flow import Blocked
from lightning_sg.partition.loss_inputs import LossInputs
from lightning_sg.partition.work import StageWork
from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.layout import Layout
from lightning_sg.predictors.stage_size import StageSize

#: Stands, among what a tensor owes something to, for random numbers that only its stage draws.
NUMBERS = "random numbers"


@dataclass(frozen=True)
class Leak:
    """An activation that a later stage uses although it did not pass the boundary between the two stages.

    Attributes:
        made_in: The stage that computed it.
        made_by: The submodule that computed it.
        used_in: The stage that uses it.
        used_by: The submodule that uses it.
        operation: The torch operation that uses it.
        shape: Its shape.
        differentiable: Whether a gradient flows back through this use.
        apart: The submodules that computed it, if what crosses the boundary owes nothing to them: a teacher.
        makers: The submodules and boundaries that it owes something to, and :data:`NUMBERS`.
    """

    made_in: int
    made_by: str
    used_in: int
    used_by: str
    operation: str
    shape: tuple[int, ...]
    differentiable: bool
    apart: tuple[str, ...] = ()
    makers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TurnedBack:
    """An output of a later stage that the step runs through an earlier one.

    Attributes:
        boundary: The boundary that it comes to again.
        behind: The boundary that it had crossed before.
        made_by: The submodule that computed it.
    """

    boundary: str
    behind: str
    made_by: str


@dataclass
class Trace:
    """The result of tracing one step.

    Attributes:
        order: The boundaries in the order in which the data reaches them.
        uses: For each parameter and buffer that the step used, the stages that used it.
        sizes: For each parameter that the step used, the number of its elements.
        shapes: For each boundary, the shapes of the floating-point tensors that cross it first.
        layouts: For each boundary, the order of their dimensions.
        bytes: For each boundary, the total size of the tensors that cross it.
        work: For each stage, its work in one step.
        device: The kind of device that the step runs on.
        leaks: Activations that go around a boundary.
        turned_back: Outputs of later stages that the step runs through earlier ones.
        blocked: For each boundary through which no gradient flows back, why.
        times: For each boundary in time, the stages that write to it or read from it.
        loss: The model's own loss, or ``None`` if predictors do not know it.
        inputs: What the loss compares the network with, by which predictors choose their context.
        cut_short: Why the trace ended early, or ``None`` if it reached the end of the step. This happens only in the
            last stage, whose code may read values that fake tensors do not have. The rest of the step belongs to the
            last stage.
    """

    order: list[str] = field(default_factory=list)
    uses: dict[str, set[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    work: list[StageWork] = field(default_factory=list)
    device: str = "cpu"
    leaks: list[Leak] = field(default_factory=list)
    turned_back: list[TurnedBack] = field(default_factory=list)
    blocked: dict[str, Blocked] = field(default_factory=dict)
    times: dict[str, set[int]] = field(default_factory=dict)
    loss: LossInfo | None = None
    inputs: LossInputs = field(default_factory=LossInputs)
    cut_short: str | None = None

    @property
    def stages(self) -> int:
        """The number of stages: one more than boundaries."""
        return len(self.order) + 1

    @property
    def flops(self) -> list[int]:
        """For each stage, the floating-point operations of its forward pass, as torch counts them."""
        return [int(work.forward.flops) for work in self.work]

    def size_of(self, stage: int) -> StageSize:
        """The size of a stage; a training step takes about three times the operations of a forward pass."""
        used = [name for name, stages in self.uses.items() if stage in stages]
        return StageSize(sum(self.sizes.get(name, 0) for name in used), 3.0 * self.flops[stage])


__all__ = ["NUMBERS", "Leak", "Trace", "TurnedBack"]
