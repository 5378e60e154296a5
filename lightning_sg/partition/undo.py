"""Undoes what a step changes in its module."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Restores the attributes of ``module`` and its submodules on exit, and ``requires_grad`` of its parameters.

    Lists, dicts, sets and deques that are attributes get their contents back too: collected outputs, counters of steps.
    Optimizers hold the real parameters, so ``toggle_optimizer`` freezes those even where fake tensors stand for them;
    a step that ends early does not thaw them.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    attributes = [(child.__dict__, dict(child.__dict__)) for child in module.modules()]
    containers = [
        (value, copy.copy(value))
        for _held, values in attributes
        for value in values.values()
        if type(value) in (list, dict, set, deque, defaultdict)
    ]
    try:
        yield
    finally:
        for parameter, before in trainable:
            parameter.requires_grad_(before)
        for held, values in attributes:
            held.clear()
            held.update(values)
        for container, content in containers:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)


__all__ = ["undone"]
