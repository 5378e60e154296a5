"""Records of training runs, as the comparisons read them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.runs import Run
from benchmarks.tasks import BACKPROPAGATION, TASKS, WHOLE

DEFAULT = "synthetic gradients"


ERROR = TASKS["mnist-mlp-3"].metric


def record_of(run: Run, value: float | None, **others: Any) -> dict[str, Any]:
    metric = TASKS[run.task].metric
    return {
        **asdict(run),
        "metrics": {} if value is None else {metric.key: value, metric.watched: value, "val_loss": value},
        "diverged": value is None,
        "error": None,
        "curve": [],
        "steps": 100,
        "seconds": 10.0,
        "fingerprint": run.seed,
        **others,
    }


def base(seed: int, value: float | None, task: str = "mnist-mlp-3", **others: Any) -> dict[str, Any]:
    return record_of(Run(task, WHOLE, BACKPROPAGATION, seed, 1e-3), value, **others)


def decoupled(seed: int, value: float | None, task: str = "mnist-mlp-3", split: str = "every", **others: Any):
    return record_of(Run(task, split, DEFAULT, seed, 1e-3), value, **others)


def line(text: str, begins: str, number: int = -1) -> list[str]:
    """The columns of a row."""
    rows = [row for row in text.splitlines() if row.startswith(f"| {begins}")]
    return [column.strip() for column in rows[number].strip("|").split("|")]
