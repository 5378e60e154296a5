"""The numbers of a report: final values of run and baselines, and of each boundary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_sg.tools.report.read import Run, Series, natural

# From so many values on, a metric that is logged several times an epoch is the noisy figure of single batches.
_MANY = 20


@dataclass
class Row:
    """The final values of one metric.

    Attributes:
        metric: Its name.
        smoothed: Whether the values are medians over the last tenth of what was logged, not the last ones.
        values: The run's value, then each baseline's; ``None`` for one that has no such metric.
        differences: The run's value less each baseline's, ``None`` where either has none.
    """

    metric: str
    smoothed: bool
    values: list[float | None]
    differences: list[float | None]


@dataclass
class Figure:
    """One quantity of one boundary.

    Attributes:
        final: The last value, or the median over the last tenth of many.
        median: The median over the whole run.
    """

    final: float
    median: float


def compare(run: Run, baselines: Sequence[Run]) -> list[Row]:
    """Sets the final values of a run beside those of its baselines.

    Args:
        run: The run.
        baselines: Those to compare with.

    Returns:
        A row for each metric that any of them has.
    """
    runs = [run, *baselines]
    rows = []
    for metric in metric_names(runs):
        smoothed = any(is_noisy(each.metrics[metric], each.epochs) for each in runs if metric in each.metrics)
        values = [final(each.metrics[metric], smoothed) if metric in each.metrics else None for each in runs]
        own, others = values[0], values[1:]
        differences = [None if own is None or other is None else own - other for other in others]
        rows.append(Row(metric, smoothed, values, differences))
    return rows


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Every metric that any run has: training first, then validation, others, and test."""

    def rank(name: str) -> tuple[int, list[tuple[int, int, str]]]:
        for place, beginnings in enumerate((("train", "loss"), ("val",))):
            if name.startswith(beginnings):
                return place, natural(name)
        return (3 if name.startswith("test") else 2), natural(name)

    return sorted({name for run in runs for name in run.metrics}, key=rank)


def boundary_figures(run: Run) -> dict[str, dict[str, Figure]]:
    """The final and the median value of every quantity at every boundary.

    Args:
        run: The run.

    Returns:
        For each boundary, figures by key. Of ``guarded`` the median is replaced by the share of logged steps.
    """
    table: dict[str, dict[str, Figure]] = {}
    for name, by in run.boundaries.items():
        table[name] = {}
        for key, series in by.items():
            values = series.finite()
            if key == "guarded":
                share = statistics.fmean(value >= 0.5 for value in values) if values else math.nan
                table[name][key] = Figure(series.values[-1], share)
            else:
                middle = statistics.median(values) if values else math.nan
                table[name][key] = Figure(final(series, is_noisy(series, run.epochs)), middle)
    return table


def is_noisy(series: Series, epochs: int) -> bool:
    """Whether a series has many values and several an epoch: then it shows single batches."""
    return len(series.values) >= _MANY and len(series.values) > 2 * epochs


def final(series: Series, smoothed: bool) -> float:
    """The last value, or the median of the last tenth of a series (of five values at least).

    Args:
        series: The series.
        smoothed: Take the median. A run that ends in NaN still ends in NaN.
    """
    last = series.values[-1]
    if not smoothed or not math.isfinite(last):
        return last
    tail = series.values[-max(5, len(series.values) // 10) :]
    return statistics.median(value for value in tail if math.isfinite(value))


def remarks(run: Run, baselines: Sequence[Run]) -> list[str]:
    """What must be known to read the comparison.

    Args:
        run: The run.
        baselines: Those that it is compared with.

    Returns:
        Sentences.
    """
    notes = [note for each in (run, *baselines) for note in each.notes]
    if not run.boundaries:
        notes.append(
            f"{run.label} has no sg/ columns: it had no boundaries, so there is nothing to say about alignment. "
            "Was the callback SyntheticGradients (or the strategy) on, and was log_every_n_steps reached?"
        )
    for baseline in baselines:
        if baseline.boundaries:
            notes.append(f"The baseline {baseline.label} has boundaries too: it is not plain backpropagation.")
        if baseline.last_step != run.last_step:
            notes.append(
                f"{run.label} ends at step {run.last_step}, the baseline {baseline.label} at step "
                f"{baseline.last_step}: their final values are not those of equally long runs."
            )
    return list(dict.fromkeys(notes))
