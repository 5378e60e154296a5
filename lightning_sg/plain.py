"""Turns NumPy's numbers and strings into Python's own, which a checkpoint can hold without code to make them."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A value with NumPy's numbers and strings as Python's own, in all its containers.

    Containers of other kinds than dict, list and tuple stay as they are, with what is in them: their users may rely on
    them.

    Example::

        >>> import numpy as np
        >>> plain({"lr": np.float64(0.1), "betas": (np.float32(0.5), 0.9)})
        {'lr': 0.1, 'betas': (0.5, 0.9)}
    """
    if type(value) in (dict, list, tuple):
        if isinstance(value, dict):
            return {plain(key): plain(each) for key, each in value.items()}
        return type(value)(plain(each) for each in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


#: What may have NumPy's numbers from a user or an optimizer in it, in a checkpoint of Lightning's.
_NUMBERS = ("optimizer_states", "lr_schedulers", "hyper_parameters", "datamodule_hyper_parameters")


def plain_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with Python's own numbers and strings in optimizers, schedules and hyperparameters."""
    return {key: plain(value) if key in _NUMBERS else value for key, value in checkpoint.items()}


__all__ = ["plain", "plain_checkpoint"]
