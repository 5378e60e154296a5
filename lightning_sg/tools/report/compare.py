"""The numbers of a report: final values of the run beside its baselines', and the metrics of each boundary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_sg.tools.report.run import Run, Series, natural

# A metric with this many values, several of them in an epoch, is a noisy value of single batches.
_MANY = 20


@dataclass
class Row:
    """The final values of one metric.

    Attributes:
        metric: Its name.
        smoothed: Whether the values are medians of the last tenth of what was logged, instead of the last values.
        values: The run's value, then each baseline's; ``None`` where the metric is missing.
        differences: The run's value minus each baseline's; ``None`` where either is missing.
    """

    metric: str
    smoothed: bool
    values: list[float | None]
    differences: list[float | None]


@dataclass
class BoundaryMetric:
    """One metric of one boundary.

    Attributes:
        final: The last value, or the median of the last tenth if there are many.
        median: The median over the whole run.
    """

    final: float
    median: float


def compare(run: Run, baselines: Sequence[Run]) -> list[Row]:
    """Compares the final values of a run with those of its baselines.

    Args:
        run: The run.
        baselines: The runs to compare it with.

    Returns:
        A row for each metric that any of them has.
    """
    runs = [run, *baselines]
    rows = [_row(metric, runs) for metric in metric_names(runs)]
    if any(each.seconds.values for each in runs):
        rows.append(
            _made("seconds", False, [each.seconds.values[-1] if each.seconds.values else None for each in runs])
        )
    return rows


def _row(metric: str, runs: Sequence[Run]) -> Row:
    smoothed = any(is_noisy(each.metrics[metric], each.epochs) for each in runs if metric in each.metrics)
    values = [final(each.metrics[metric], smoothed) if metric in each.metrics else None for each in runs]
    return _made(metric, smoothed, values)


def _made(metric: str, smoothed: bool, values: list[float | None]) -> Row:
    own, others = values[0], values[1:]
    differences = [None if own is None or other is None else own - other for other in others]
    return Row(metric, smoothed, values, differences)


def metric_names(runs: Sequence[Run]) -> list[str]:
    """The metrics that any run has: training first, then validation, then others, then test."""

    def rank(name: str) -> tuple[int, list[tuple[int, int, str]]]:
        for place, beginnings in enumerate((("train", "loss"), ("val",))):
            if name.startswith(beginnings):
                return place, natural(name)
        return (3 if name.startswith("test") else 2), natural(name)

    return sorted({name for run in runs for name in run.metrics}, key=rank)


def boundary_metrics(run: Run) -> dict[str, dict[str, BoundaryMetric]]:
    """The final and the median value of every metric of every boundary.

    Args:
        run: The run.

    Returns:
        For each boundary, its metrics by key. For ``guarded`` the median is replaced by the share of logged steps at
        which the guard had taken over.
    """
    return {
        name: {key: _boundary_metric(key, series, run.epochs) for key, series in by.items()}
        for name, by in run.boundaries.items()
    }


def _boundary_metric(key: str, series: Series, epochs: int) -> BoundaryMetric:
    values = series.finite()
    if key == "guarded":
        share = statistics.fmean(value >= 0.5 for value in values) if values else math.nan
        return BoundaryMetric(series.values[-1], share)
    median = statistics.median(values) if values else math.nan
    return BoundaryMetric(final(series, is_noisy(series, epochs)), median)


def is_noisy(series: Series, epochs: int) -> bool:
    """Whether a series has many values, several of them in an epoch, and so shows single batches."""
    return len(series.values) >= _MANY and len(series.values) > 2 * epochs


def final(series: Series, smoothed: bool) -> float:
    """The last value, or the median of the last tenth of a series (at least five values).

    Args:
        series: The series.
        smoothed: Take the median. A series that ends in NaN still gives NaN.
    """
    last = series.values[-1]
    if not smoothed or not math.isfinite(last):
        return last
    tail = series.values[-max(5, len(series.values) // 10) :]
    return statistics.median(value for value in tail if math.isfinite(value))


def remarks(run: Run, baselines: Sequence[Run]) -> list[str]:
    """What a reader must know to read the comparison.

    Args:
        run: The run.
        baselines: The runs that it is compared with.

    Returns:
        Sentences, without duplicates.
    """
    notes = [note for each in (run, *baselines) for note in each.notes]
    if not run.boundaries:
        notes.append(
            f"{run.label} has no sg/ columns: it had no boundaries, so there is no alignment to report. "
            "Was the callback SyntheticGradients (or the strategy) on, and was log_every_n_steps reached?"
        )
    for baseline in baselines:
        if baseline.boundaries:
            notes.append(f"The baseline {baseline.label} has boundaries too: it is not plain backpropagation.")
        if baseline.last_step != run.last_step:
            notes.append(
                f"{run.label} ends at step {run.last_step}, the baseline {baseline.label} at step "
                f"{baseline.last_step}: their final values come from runs of different lengths."
            )
    return list(dict.fromkeys(notes))


__all__ = [
    "BoundaryMetric",
    "Row",
    "boundary_metrics",
    "compare",
    "final",
    "is_noisy",
    "metric_names",
    "remarks",
]
