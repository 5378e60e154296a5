"""The tasks in a context: one for a tensor, several for a dict of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from lightning_sg.arguments import MOST_FEATURES, by_name, check_fields, either, number, one_of, optional, whole
from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.criteria import Kind
from lightning_sg.predictors.features import is_label

# What an argument ``classes`` may be.
CLASSES = optional(either(whole(1, MOST_FEATURES), by_name(whole(1, MOST_FEATURES), "a dict of such numbers by task")))


@dataclass(frozen=True)
class Tasks:
    """The losses of a ``LossModelPredictor`` whose context is a dict of tensors.

    Args:
        losses: The loss of each task: ``"cross_entropy"``, ``"binary_cross_entropy"``, ``"mse"``, ``"l1"``,
            ``"smooth_l1"`` or ``"huber"``. Only the entries named here are used. By default all tensors are, each with
            the loss that suits its dtype.
        weights: The weight of each task's loss, 0 to 1e6; 1 for tasks not named.

    Raises:
        TypeError: If an argument is no dict by name.
        ValueError: If there is no such loss, or a weight is out of range.
    """

    losses: dict[str, Kind] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        losses = by_name(one_of(*get_args(Kind)), f"among {', '.join(get_args(Kind))}, by task")
        weights = by_name(number(least=0, most=1e6), "a dict of finite numbers by task")
        check_fields("Tasks", self, losses=losses, weights=weights)


def tasks_of(context: Any, named: Collection[str] | None = None) -> dict[str, Tensor]:
    """The labels or goals in a context, by task.

    Args:
        context: A tensor, or a dict of tensors, whose other entries are ignored.
        named: The entries to take from a dict; by default all tensors.

    Returns:
        ``{"": context}`` for a tensor.

    Raises:
        ValueError: If there is no tensor, or a named one is missing.
    """
    if isinstance(context, Tensor):
        if named and "" not in named:
            raise ValueError(f"the context is a tensor, but the tasks {sorted(named)} need a dict of tensors.")
        return {"": context}
    if not isinstance(context, Mapping) or not any(isinstance(entry, Tensor) for entry in context.values()):
        got = f"a dict of {list(context)}" if isinstance(context, Mapping) else type(context).__name__
        raise ValueError(
            "LossModelPredictor needs the labels (or regression targets) as a tensor context, or a dict of tensors, "
            f"but got {got}. If batches are not (x, y) pairs, set SyntheticGradients(context=...) to a key, an index "
            "or a function of the batch. MLPPredictor works without labels."
        )
    tasks = {str(name): entry for name, entry in context.items() if isinstance(entry, Tensor)}
    missing = sorted(set(named or ()) - set(tasks))
    if missing:
        raise ValueError(f"the context has no tensors called {missing}; it has {sorted(tasks)}.")
    return {name: tasks[name] for name in named} if named else tasks


def loss_of_task(name: str, tasks: Mapping[str, Tensor], loss: LossInfo | None) -> LossInfo | None:
    """What is known about one task's loss.

    The trace shows the first loss of the step but not which task it belongs to. With several tasks, only a
    cross-entropy can be assigned, if a single task has labels.
    """
    if loss is None or len(tasks) == 1:
        return loss
    labels = [task for task, context in tasks.items() if is_label(context)]
    return loss if loss.kind == "cross_entropy" and labels == [name] else None


__all__ = ["CLASSES", "Tasks", "loss_of_task", "tasks_of"]
