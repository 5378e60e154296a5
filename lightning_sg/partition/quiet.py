"""Keeps a module from logging, printing and updating metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_sg.partition.shadow import shadowed


@contextmanager
def quiet(module: nn.Module, others: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Makes ``log``, ``log_dict``, ``print`` and every metric of ``module`` do nothing inside the context.

    A metric that is called returns zero; a collection of metrics returns an empty dict.

    Args:
        module: The module.
        others: Further modules, whose metrics do nothing either.
    """
    shadows: list[tuple[nn.Module, str, Any]] = [
        (module, "log", lambda *_args, **_kwargs: None),
        (module, "log_dict", lambda *_args, **_kwargs: None),
        (module, "print", lambda *_args, **_kwargs: None),
    ]
    for child in dict.fromkeys([*module.modules(), *others]):
        if isinstance(child, (Metric, MetricCollection)):
            empty: Any = {} if isinstance(child, MetricCollection) else torch.zeros(())
            shadows.append((child, "forward", lambda *_args, _empty=empty, **_kwargs: _empty))
            shadows.append((child, "update", lambda *_args, **_kwargs: None))
    with shadowed(shadows):
        yield


__all__ = ["quiet"]
