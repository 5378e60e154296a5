"""A traced step logs nothing and updates no metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from tests.partition.models import CLASSES, WIDTH, Cut, labelled, trace


class Calls(Metric):
    """Counts its updates in place, and outside itself."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")
        self._note = lambda: seen.append("metric")

    def update(self, value: Tensor) -> None:
        self.count.add_(1)
        self._note()

    def compute(self) -> Tensor:
        return self.count


def test_a_traced_step_logs_nothing_and_counts_no_metric() -> None:
    seen: list[str] = []

    class Logging(Cut):
        def log(self, *_args: Any, **_kwargs: Any) -> None:
            seen.append("log")

        def log_dict(self, *_args: Any, **_kwargs: Any) -> None:
            seen.append("log_dict")

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            loss: Tensor = super().training_step(batch)
            self.log("loss", self.metric(loss))
            self.log_dict(self.metrics(loss))
            self.metric.update(loss)
            self.metrics.update(loss)
            return loss

    module = Logging(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    module.metric = Calls(seen)
    module.metrics = MetricCollection({"calls": Calls(seen)})
    assert trace(module).cut_short is None
    assert seen == []
    assert module.metric.count == 0
    module.training_step(labelled(WIDTH))
    assert {"log", "log_dict", "metric"} == set(seen)
