"""The tasks in a context: one for a tensor, several for a dict of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.features import is_label


def tasks_of(context: Any, named: Collection[str] | None = None) -> dict[str, Tensor]:
    """The labels or goals in a context, by task.

    Args:
        context: A tensor, or a dict of tensors, whose other entries are passed over.
        named: The entries to take from a dict; by default all tensors.

    Returns:
        ``{"": context}`` for a tensor.

    Raises:
        ValueError: If there is none, or a named one is missing.
    """
    if isinstance(context, Tensor):
        if named and "" not in named:
            raise ValueError(f"the context is a tensor, where the tasks {sorted(named)} need a dict of tensors.")
        return {"": context}
    if not isinstance(context, Mapping) or not any(isinstance(entry, Tensor) for entry in context.values()):
        got = f"a dict of {list(context)}" if isinstance(context, Mapping) else type(context).__name__
        raise ValueError(
            "LossModelPredictor needs the labels (or regression targets) as a tensor context, or a dict of tensors, "
            f"but got {got}. Batches that are not (x, y) pairs need SyntheticGradients(context=...), "
            "a key, an index or a function of the batch; or use MLPPredictor, which can do without."
        )
    tasks = {str(name): entry for name, entry in context.items() if isinstance(entry, Tensor)}
    missing = sorted(set(named or ()) - set(tasks))
    if missing:
        raise ValueError(f"the context has no tensors called {missing}; it has {sorted(tasks)}.")
    return {name: tasks[name] for name in named} if named else tasks


def loss_of_task(name: str, tasks: Mapping[str, Tensor], loss: LossInfo | None) -> LossInfo | None:
    """What is known about one task's loss: the trace shows the first loss of the step, and not whose it is."""
    if loss is None or len(tasks) == 1:
        return loss
    labels = [task for task, context in tasks.items() if is_label(context)]
    return loss if loss.kind == "cross_entropy" and labels == [name] else None


__all__ = ["loss_of_task", "tasks_of"]
