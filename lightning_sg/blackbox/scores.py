"""Takes the scores that come back to a boundary, at once or from a pool, and refuses what is none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lightning_sg.errors import BoundaryError, SyntheticGradientsError

#: Scores that have not come yet: all in one, or in several parts, whose rows follow each other.
Coming = Future[Any] | Sequence[Future[Any]]


def are_coming(score: Any) -> bool:
    """Whether these are futures."""
    if isinstance(score, Future):
        return True
    return isinstance(score, (list, tuple)) and bool(score) and all(isinstance(part, Future) for part in score)


def arrived(score: Coming, boundary: str, batch: int) -> Any:
    """Waits for scores.

    Args:
        score: The futures.
        boundary: The name of the boundary, for messages.
        batch: The number of the training batch, for messages.

    Raises:
        SyntheticGradientsError: If what computes them has failed.
    """
    parts = [score] if isinstance(score, Future) else list(score)
    try:
        found = [torch.as_tensor(part.result()) for part in parts]
    except Exception as error:
        raise SyntheticGradientsError(
            f"What computes the scores of '{boundary}' failed for training batch {batch}: "
            f"{type(error).__name__}: {error}. See the error above for where."
        ) from error
    return found[0] if len(found) == 1 else torch.cat([part if part.ndim else part.unsqueeze(0) for part in found])


def checked_scores(score: Any, boundary: str, like: Tensor, evaluations: int) -> Tensor:
    """Scores as float32 on the device of the activation, with whatever graph they have.

    Args:
        score: What the user gave.
        boundary: The name of the boundary, for messages.
        like: The activation, ``(R, ...)``.
        evaluations: The number of evaluations E that R has in it.

    Returns:
        ``(R,)``, or with more of the activation's dimensions.

    Raises:
        BoundaryError: If there is not one for each row, or for each row and element.
    """
    try:
        found = torch.as_tensor(score).to(like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BoundaryError(
            f"`loss` of '{boundary}' takes a tensor, an array or futures of them, not {type(score).__name__}: {error}"
        ) from None
    rows, shape = like.shape[0], tuple(found.shape)
    if shape and shape[0] == rows and shape == tuple(like.shape[: len(shape)]) and not found.is_complex():
        return found.float()
    several = f", {evaluations} evaluations of {rows // evaluations} samples," if evaluations > 1 else ""
    remedy = (
        "Do not reduce the cost: use reduction='none', and the mean over all dimensions but the first."
        if len(shape) == 0
        else f"Reduce it to shape ({rows},), as with `cost.flatten(1).mean(1)`."
        if shape[0] == rows
        else f"Compute one cost for each of the {rows} rows that the boundary returned."
    )
    raise BoundaryError(
        f"`loss` of '{boundary}' needs one score for each sample{several} or for each sample and element: shape "
        f"({rows},) or the first dimensions of {tuple(like.shape)}, not {shape}. {remedy}"
    )


def refuse_way_around(score: Tensor, carriers: Sequence[Tensor], boundary: str) -> None:
    """Refuses scores whose graph reaches what crossed the boundary: its gradient would count twice.

    Args:
        score: The scores.
        carriers: What reached the boundary, with the graph of the stage before.
        boundary: Its name, for messages.

    Raises:
        BoundaryError: If they do.
    """
    goals = {_node_of(carrier) for carrier in carriers if carrier.requires_grad}
    found, waiting = set(), [score.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        if node in goals:
            raise BoundaryError(
                f"The score given to `loss` of '{boundary}' carries a gradient to what went into the boundary, and "
                "would count twice. Compute the score from what the boundary returned. If a part of the cost is a "
                f"differentiable function of the activation, add it apart: `{boundary}.loss(score) + part.mean()`."
            )
        found.add(node)
        waiting.extend(before for before, _output in node.next_functions)


def _node_of(tensor: Tensor) -> Any:
    """Where a tensor is in the graph; of a leaf, where its gradient is accumulated."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    with torch.enable_grad():
        node = tensor.view_as(tensor).grad_fn
    assert node is not None
    return node.next_functions[0][0]


__all__ = ["Coming", "are_coming", "arrived", "checked_scores", "refuse_way_around"]
