"""What an estimator is told of a batch besides the activation, once for each row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sg._compat import tree_leaves, tree_map_only
from lightning_sg.blackbox.sampling import repeated


def context_rows(given: Any, told: Any, samples: int, evaluations: int) -> Any:
    """The context of a call, repeated for each evaluation.

    Args:
        given: What the boundary was given, or ``None``.
        told: What the callback takes from the batch, which is used if nothing was given and it has the samples first.
        samples: The number of samples N.
        evaluations: The number of evaluations E.

    Returns:
        A list of tensors ``(E · N, ...)``; ``None`` without any.

    Raises:
        ValueError: If what was given has not the samples first.
    """
    source = told if given is None else given
    tensors = [leaf.detach() for leaf in tree_leaves(source) if isinstance(leaf, Tensor)]
    fits = [tensor.ndim > 0 and tensor.shape[0] == samples for tensor in tensors]
    if given is not None and not all(fits):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"a context of shapes {shapes} has not {samples} samples first")
    if not tensors or not all(fits):
        return None
    rows: Any = tree_map_only(Tensor, lambda tensor: repeated(tensor, evaluations), tensors)
    return rows


__all__ = ["context_rows"]
