"""Late gradients by another forward pass: a stage runs an old batch again, with its newest weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_sg.boundary import Crossing, Site, differentiable
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.errors import BoundaryError
from lightning_sg.lightning_api import pl
from lightning_sg.partition.step import StepEnds
from lightning_sg.passes import hearing_passes
from lightning_sg.predictors.base import Gradients
from lightning_sg.training.record import Record


class TakesExact(Protocol):
    """Where the exact gradient of what a stage was given goes."""

    def take(self, gradients: Sequence[Tensor | None] | None) -> None:
        """Takes gradients of the mean loss, one for each tensor that carries one; ``None`` if they are not known."""


@dataclass(frozen=True)
class ToRecord:
    """To the record of a boundary in this process.

    Attributes:
        record: The record.
    """

    record: Record

    def take(self, gradients: Sequence[Tensor | None] | None) -> None:
        """See :meth:`TakesExact.take`."""
        if gradients is not None:
            self.record.add_exact(gradients)


@dataclass(frozen=True)
class StageInputs:
    """What a stage went on with.

    Attributes:
        tensors: What crossed the boundary before it, detached.
        carries: For each, whether it carries a gradient.
        before: Where the exact gradients of those that do go.
    """

    tensors: list[Tensor]
    carries: list[bool]
    before: TakesExact


@dataclass
class ReplayedBatch:
    """A batch that stages run once more when its true gradient has come; in place of its graph, its inputs are kept.

    Attributes:
        number: How many training batches there were before it.
        index: Lightning's ``batch_idx``.
        data: A copy of the batch.
        scale: The factor on the gradients of its own backward pass, which the other one has on its way too.
        modes: Which modules were in training mode.
        inputs: By boundary, what the stage after it went on with.
        records: By boundary, the crossing at the end of the stage before it.
    """

    number: int
    index: int
    data: Any
    scale: GradientScale
    modes: list[bool] = field(default_factory=list)
    inputs: dict[str, StageInputs] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    def note(self, boundary: str, record: Record) -> None:
        """A stage has come to its end.

        Raises:
            BoundaryError: If it had come there before.
        """
        if boundary in self.records:
            raise BoundaryError(
                f"The step has crossed boundary '{boundary}' twice. LateGradients(recompute=True) needs steps that run "
                "the network once. Use recompute=False."
            )
        self.records[boundary] = record

    def note_inputs(self, boundary: str, tensors: Sequence[Tensor], carries: list[bool], before: TakesExact) -> None:
        """A stage goes on with what has crossed the boundary before it."""
        self.inputs[boundary] = StageInputs([tensor.detach() for tensor in tensors], carries, before)


class Rerun(Protocol):
    """Runs the user's step again, without a trace of it but for what the stage's own code does to Python objects."""

    def __call__(self, batch: ReplayedBatch, crossings: Mapping[str, Crossing]) -> None:
        """Runs it.

        Args:
            batch: The batch.
            crossings: What happens at boundaries; at others nothing does.
        """


def cannot_rerun(batch: ReplayedBatch, crossings: Mapping[str, Crossing]) -> None:
    """Nothing runs before the session has a runtime."""
    raise AssertionError("no runtime has been given")


class Replay:
    """One stage with one old batch.

    Args:
        batch: The batch.
        rerun: Runs the step again.
        before: The boundary before the stage; ``None`` if it is the first one.
        after: The boundary after it.
    """

    def __init__(self, batch: ReplayedBatch, rerun: Rerun, before: str | None, after: str) -> None:
        self._batch = batch
        self._rerun = rerun
        self._before = before
        self._after = after
        self._inputs = None if before is None else batch.inputs.get(before)
        self._leaves: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def backward(self, exact: Gradients | None, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Runs the stage and backpropagates; the stage before is told the exact gradient of what it handed on.

        Args:
            exact: The per-sample exact gradient at the stage's end; ``None`` if it is not known.
            parameters: The stage's.

        Returns:
            The gradients of the parameters, of the mean loss.
        """
        record = self._batch.records.pop(self._after)
        if exact is None or (self._before is not None and self._inputs is None):
            self._tell(None)
            return {}
        with torch.inference_mode(False), torch.enable_grad():
            self._rerun(self._batch, self._crossings())
            scale, inputs = self._batch.scale, [*self._leaves, *parameters.values()]
            seeds = scale.applied(exact, record.samples, [output.dtype for output in self._outputs])
            found = torch.autograd.grad(self._outputs, inputs, seeds, allow_unused=True)
        gradients = iter(scale.all_removed(found))
        self._tell([next(gradients) for _ in self._leaves])
        return {name: gradient for name, gradient in zip(parameters, gradients) if gradient is not None}

    def _tell(self, gradients: Sequence[Tensor | None] | None) -> None:
        if self._inputs is not None and any(self._inputs.carries):
            self._inputs.before.take(gradients)

    def _crossings(self) -> dict[str, Crossing]:
        crossings: dict[str, Crossing] = {self._after: self._end}
        if self._before is not None:
            crossings[self._before] = self._begin
        return crossings

    def _begin(self, tensors: list[Tensor]) -> list[Tensor]:
        assert self._inputs is not None
        given = []
        for tensor, carries in zip(self._inputs.tensors, self._inputs.carries):
            if carries:
                leaf = tensor.detach().requires_grad_()
                self._leaves.append(leaf)
                tensor = leaf.clone()  # an in-place operation may follow, which a leaf refuses
            given.append(tensor)
        return given

    def _end(self, tensors: list[Tensor]) -> list[Tensor]:
        self._outputs = [tensor for tensor in tensors if differentiable(tensor)]
        raise StepEnds


@contextmanager
def replaying(
    module: pl.LightningModule,
    sites: Sequence[Site],
    batch: ReplayedBatch,
    crossings: Mapping[str, Crossing],
    passed: Callable[[], None],
) -> Iterator[None]:
    """Prepares a model for another run of a step: modes, precision, and what happens at boundaries.

    Args:
        module: The model.
        sites: Its boundaries.
        batch: The batch.
        crossings: What happens at boundaries; at others nothing does.
        passed: Is called whenever the step has come to another stage.
    """
    with ExitStack() as stack:
        stack.enter_context(_modes_as(module, batch.modes))
        stack.enter_context(hearing_passes(module, sites, passed))
        stack.enter_context(module.trainer.precision_plugin.train_step_context())
        for site in sites:
            stack.enter_context(site.instead(crossings.get(site.name)))
        yield


@contextmanager
def _modes_as(module: nn.Module, modes: Sequence[bool]) -> Iterator[None]:
    """Has modules in training mode that were so before, whatever they are in now."""
    children = list(module.modules())
    now = [child.training for child in children]
    _set_modes(children, modes)
    try:
        yield
    finally:
        _set_modes(children, now)


def _set_modes(children: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for child, training in zip(children, modes):
        child.training = training


#: Applies the gradients of a batch's parameters when they are due.
Hold = Callable[[int, Mapping[str, Tensor]], None]

__all__ = [
    "Hold",
    "Replay",
    "ReplayedBatch",
    "Rerun",
    "StageInputs",
    "TakesExact",
    "ToRecord",
    "cannot_rerun",
    "replaying",
]
