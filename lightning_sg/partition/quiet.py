"""Keeps a module from logging and from updating metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_sg.partition.shadow import shadowed


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Makes ``log``, ``log_dict`` and every metric of ``module`` do nothing inside the context.

    A metric that is called returns zero; a collection of metrics returns an empty dict.
    """
    shadows: list[tuple[nn.Module, str, Any]] = [
        (module, "log", lambda *_args, **_kwargs: None),
        (module, "log_dict", lambda *_args, **_kwargs: None),
    ]
    for child in module.modules():
        if isinstance(child, (Metric, MetricCollection)):
            empty: Any = {} if isinstance(child, MetricCollection) else torch.zeros(())
            shadows.append((child, "forward", lambda *_args, _empty=empty, **_kwargs: _empty))
            shadows.append((child, "update", lambda *_args, **_kwargs: None))
    with shadowed(shadows):
        yield


__all__ = ["quiet"]
