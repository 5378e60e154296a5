"""Recognises the model's own loss in a call of a torch function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from lightning_sg.predictors.base import LossInfo

_KINDS: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "cross_entropy",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.huber_loss: "huber",
    F.l1_loss: "l1",
    F.mse_loss: "mse",
    F.smooth_l1_loss: "smooth_l1",
}


def loss_of_call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossInfo | None:
    """Describes the loss that a call computes.

    Args:
        func: The torch function that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The loss, or ``None`` if ``func`` is not a loss that predictors know.
    """
    kind = _KINDS.get(func)
    if kind is None:
        return None
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    output = given["input"]
    if kind == "cross_entropy":
        outputs = output.shape[1 if output.ndim > 1 else -1]
    else:
        outputs = output.shape[-1] if output.ndim > 1 else 1
    return LossInfo(
        kind,
        int(outputs),
        ignore_index=int(given.get("ignore_index", -100)),
        label_smoothing=float(given.get("label_smoothing", 0.0)),
        beta=float(given.get("beta", given.get("delta", 1.0))),
    )


__all__ = ["loss_of_call"]
