"""Takes from a batch the context of the gradient predictors that the user names, or guesses where the labels are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_sg._compat import tree_map_only
from lightning_sg.batch.chunks import content_of
from lightning_sg.batch.entries import entry_of
from lightning_sg.subclasses import plain_tensor

ContextSource = str | int | Callable[[Any], Any] | None

#: Usual names of the entry with the labels, the most common first.
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def context_of(batch: Any, source: ContextSource) -> Any:
    """Takes the context from a batch.

    Args:
        batch: The batch, on the stage's device.
        source: ``"auto"``: a guess, for steps that cannot be traced: the second element of a sequence if it is a
            tensor, or the entry of a dict called ``labels``, ``label``, ``targets``, ``target`` or ``y``, or else
            nothing. Another string or a number: that key or index. A callable: its result for the batch. ``None``: no
            context.

    Returns:
        The context, detached; ``None`` if there is none.

    Raises:
        SyntheticGradientsError: If the batch has no such key or index.
    """
    if source is None:
        return None
    batch = content_of(batch)
    option = f"SyntheticGradients(context={source!r})"
    context = _labels(batch) if source == "auto" else entry_of(batch, source, option)
    return detached(context)


def detached(context: Any) -> Any:
    """The context without the graphs of its tensors, and without classes of their own."""
    return tree_map_only(Tensor, lambda tensor: plain_tensor(tensor).detach(), context)


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


__all__ = ["LABEL_KEYS", "ContextSource", "context_of", "detached"]
