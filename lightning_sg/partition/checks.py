"""Refuses cuts that are none: the errors that a traced step can show."""

from __future__ import annotations

from torch import nn

from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.partition.trace import Trace


def between(order: list[str], stage: int) -> str:
    """Where a stage lies, in words."""
    before = f"after boundary '{order[stage - 1]}'" if stage else "from the start"
    after = f"up to boundary '{order[stage]}'" if stage < len(order) else "to the end"
    return f"stage {stage} ({before} {after})"


def check_cuts(trace: Trace, *, split: bool) -> None:
    """Refuses activations that go around a boundary, and states and messages that would have to.

    Args:
        trace: A traced step.
        split: Whether the stages are on several processes. In one process a value that carries no gradient may go
            around a boundary; between processes nothing can.

    Raises:
        BoundaryError: If an activation goes around, or with ``split`` a boundary in time is used in several stages.
    """
    for name, stages in trace.times.items():
        if split and len(stages) > 1:
            raise BoundaryError(
                f"The boundary in time '{name}' is used in the stages {sorted(stages)}, but what is carried stays in "
                "one. Read and write it, send and receive, between the same boundaries: "
                f"all of it before '{trace.order[min(stages)]}' or all of it after."
            )
    for leak in trace.leaks:
        if split or leak.differentiable:
            around = trace.order[leak.made_in]
            raise BoundaryError(
                f"An activation goes around boundary '{around}': made in '{leak.made_by}' (stage {leak.made_in}), "
                f"of shape {leak.shape}, it is used by `{leak.operation}` in '{leak.used_by}' (stage {leak.used_in}). "
                f"The cut there is no cut. Pass it through the boundary too (`a, b = boundary(a, b)`)"
                f"{'' if split else ', detach it'} or move the boundary."
            )


def check_trainable(module: nn.Module, trace: Trace) -> None:
    """Refuses stages that have nothing to train.

    Raises:
        PartitionError: If a stage uses no parameter that requires a gradient.
    """
    trained = set()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            trained |= trace.uses.get(name, set())
    for stage in range(trace.stages):
        unseen = stage == trace.stages - 1 and trace.cut_short is not None
        if stage not in trained and not unseen:
            raise PartitionError(
                f"{between(trace.order, stage)} has no trainable parameters, so there is nothing to decouple. "
                "Remove or move one of its boundaries."
            )


__all__ = ["between", "check_cuts", "check_trainable"]
