"""Computes torchmetrics' metrics over the replicas, wherever a metric is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchmetrics import Metric

from lightning_sg.replicas import Replicas


@contextmanager
def metrics_over(replicas: Replicas) -> Iterator[None]:
    """While entered, metrics gather from the processes with the same stages in other replicas, if there are any.

    By themselves they gather over all processes. But only the last stage of each replica has values, and hooks that
    compute a metric in one process would wait for the others.

    Args:
        replicas: This process's place among the replicas.
    """
    before = Metric.sync

    def sync(
        self: Metric,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        if replicas.count == 1 and distributed_available is None:
            return
        group = replicas.group if process_group is None else process_group
        before(self, dist_sync_fn, group, should_sync, distributed_available or _with_replicas)

    Metric.sync = sync  # type: ignore[method-assign]
    try:
        yield
    finally:
        Metric.sync = before  # type: ignore[method-assign]


def _with_replicas() -> bool:
    """Tells a metric that there are replicas to gather from."""
    return True


__all__ = ["metrics_over"]
