"""Keeps a module from logging, printing and updating metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sg.partition.shadow import shadowed

#: Runs a metric that may be the loss, given its arguments, without changing its state; ``None`` if it is no loss.
RunMetric = Callable[[Metric, Any, Any], Tensor | None]


def run_no_metric(_metric: Metric, _args: Any, _kwargs: Any) -> None:
    """No metric is a loss."""


@contextmanager
def quiet(module: nn.Module, others: Iterable[nn.Module] = (), run_metric: RunMetric = run_no_metric) -> Iterator[None]:
    """Makes ``log``, ``log_dict``, ``print`` and every metric of ``module`` do nothing inside the context.

    A metric that is called returns zero, unless it is a loss; a collection of metrics returns an empty dict.

    Args:
        module: The module.
        others: Further modules, whose metrics do nothing either.
        run_metric: Computes the value of a metric that is a loss.
    """
    shadows: list[tuple[nn.Module, str, Any]] = [
        (module, "log", lambda *_args, **_kwargs: None),
        (module, "log_dict", lambda *_args, **_kwargs: None),
        (module, "print", lambda *_args, **_kwargs: None),
    ]
    for child in dict.fromkeys([*module.modules(), *others]):
        if isinstance(child, (Metric, MetricCollection)):
            shadows.append((child, "forward", _forward(child, run_metric)))
            shadows.append((child, "update", lambda *_args, **_kwargs: None))
    with shadowed(shadows):
        yield


def _forward(metric: Metric | MetricCollection, run_metric: RunMetric) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if isinstance(metric, MetricCollection):
            return {}
        result = run_metric(metric, args, kwargs)
        return torch.zeros(()) if result is None else result

    return forward


__all__ = ["RunMetric", "quiet", "run_no_metric"]
