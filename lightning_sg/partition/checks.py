"""Rejects boundaries that do not separate the stages, and stages with nothing to train."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

from torch import nn

from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.gradient_flow import Blocked, never_trains
from lightning_sg.partition.trace import NUMBERS, Leak, Trace


def between(order: list[str], stage: int) -> str:
    """Describes a stage by the boundaries around it, for messages."""
    before = f"after boundary '{order[stage - 1]}'" if stage else "from the start"
    after = f"up to boundary '{order[stage]}'" if stage < len(order) else "to the end"
    return f"stage {stage} ({before} {after})"


def check_cuts(trace: Trace, *, split: bool) -> None:
    """Rejects activations that go around a boundary, and boundaries in time that span several processes.

    Args:
        trace: A traced step.
        split: Whether the stages are on several processes. In one process a value without a gradient may go around a
            boundary; between processes nothing may.

    Raises:
        BoundaryError: If an activation goes around, or with ``split`` a boundary in time is used in several stages.
    """
    for name, stages in trace.times.items():
        if split and len(stages) > 1:
            raise BoundaryError(
                f"The boundary in time '{name}' is used in the stages {sorted(stages)}, but what it carries stays in "
                "one process. Use it in a single stage: "
                f"all of it before '{trace.order[min(stages)]}' or all of it after."
            )
    for turn in trace.turned_back:
        if split:
            raise BoundaryError(
                f"The step comes to boundary '{turn.boundary}' again with what '{turn.made_by}' makes of an output "
                f"that had crossed boundary '{turn.behind}' before: it would have to go back through the stages, which "
                "activations do not. Run the network several times on inputs from the batch, or train these stages in "
                "one process."
            )
    for leak in trace.leaks:
        if split or leak.differentiable:
            around = trace.order[leak.made_in]
            raise BoundaryError(
                f"An activation goes around boundary '{around}': '{leak.made_by}' (stage {leak.made_in}) computes it "
                f"with shape {leak.shape}, and `{leak.operation}` in '{leak.used_by}' (stage {leak.used_in}) uses it. "
                f"So this boundary does not separate the stages. {_remedy(trace, leak, split=split)}"
            )


def _remedy(trace: Trace, leak: Leak, *, split: bool) -> str:
    """What to do about an activation that goes around a boundary."""
    if leak.operation == "grad":
        return (
            "It is differentiated across the boundary, as for a gradient penalty, and a synthetic gradient has no "
            "gradient of its own. Put no boundary into the network whose gradient is taken."
        )
    through = "ass the activation through the boundary too (`a, b = boundary(a, b)`)"
    if NUMBERS in leak.makers:
        return (
            "It is drawn at random after other numbers that only its stage draws, such as those of dropout, so other "
            f"processes would draw others. Draw it before these, or p{through}."
        )
    if leak.apart:  # it has nothing to do with what crosses, such as a teacher's
        makers = " and ".join(f"'{maker}'" for maker in leak.apart)
        return (
            f"Nothing that crosses it comes from {makers}: call {makers} after boundary "
            f"'{trace.order[leak.used_in - 1]}', where the result is used, as every stage has the batch. Or p{through}."
        )
    parameters = [maker for maker in leak.makers if not maker.startswith("boundary ")]
    why = ""
    if parameters and len(parameters) == len(leak.makers):
        owners = " and ".join(f"'{maker}'" for maker in parameters)
        why = f"It depends on parameters of {owners}, not on the batch alone, which every stage has. "
    return f"{why}P{through}{'' if split else ', detach it'} or move the boundary."


def check_trainable(module: nn.Module, trace: Trace, later: Callable[[], Collection[int]] = tuple) -> None:
    """Rejects stages that have nothing to train.

    Args:
        module: The module.
        trace: A traced step.
        later: Finds the stages that later steps train; asked only if this one does not train all.

    Raises:
        PartitionError: If a stage uses no parameter that requires a gradient.
    """
    trained, trained_later = trained_stages(module, trace), cache(later)
    for stage in range(trace.stages):
        unseen = stage == trace.stages - 1 and trace.cut_short is not None
        if stage not in trained and not unseen and stage not in trained_later():
            raise PartitionError(
                f"{between(trace.order, stage)} has no trainable parameters, so there is nothing to decouple. "
                "Remove or move one of its boundaries."
            )


def check_gradients(module: nn.Module, trace: Trace, later: Callable[[], Collection[str]] = tuple) -> None:
    """Rejects boundaries through which no gradient flows back to parameters that are to train.

    Args:
        module: The module.
        trace: A traced training step.
        later: Finds the boundaries that later steps reach with a gradient; asked only if this one does not.

    Raises:
        BoundaryError: If there is one; the error says what stops the gradient.
    """
    trained, reached_later = trained_stages(module, trace), cache(later)
    for stage, boundary in enumerate(trace.order):
        why = trace.blocked.get(boundary)
        if why is None or not (stage in trained or why is Blocked.CHECKPOINTED):
            continue
        if why not in (Blocked.DETACHED, Blocked.INTEGERS) or boundary not in reached_later():
            raise never_trains(boundary, why, between(trace.order, stage))


def trained_stages(module: nn.Module, trace: Trace) -> set[int]:
    """The stages that use a parameter which requires a gradient."""
    named = module.named_parameters()
    return {stage for name, parameter in named if parameter.requires_grad for stage in trace.uses.get(name, ())}


__all__ = ["between", "check_cuts", "check_gradients", "check_trainable", "trained_stages"]
