"""The tables of a report as text, the same for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_sg.tools.report.compare import BoundaryMetric, Row
from lightning_sg.tools.report.run import Run

# The metrics of a boundary in the order of the table. Metrics that the report does not know come after them.
_ORDER = ("cosine", "norm_ratio", "bias", "variance", "loss", "bootstrapped_cosine")
_SHORT = _ORDER[:4]
_LAST = ("cost", "guarded")  # one column each
_HEADINGS = {"norm_ratio": "norm ratio", "bootstrapped_cosine": "cosine of the target"}


@dataclass
class Table:
    """Cells of text. The first column has names, the others numbers.

    Attributes:
        headings: One for each column.
        rows: The cells.
    """

    headings: list[str]
    rows: list[list[str]]


def value_table(run: Run, baselines: Sequence[Run], rows: Sequence[Row]) -> Table:
    """The final values: metric, run, then each baseline and the difference from it.

    Args:
        run: The run.
        baselines: Its baselines.
        rows: The comparison.
    """
    headings = ["metric", run.label]
    for baseline in baselines:
        headings += [baseline.label, "difference"]
    table = Table(headings, [])
    for row in rows:
        cells = [row.metric + (" *" if row.smoothed else ""), number(row.values[0])]
        for value, difference in zip(row.values[1:], row.differences):
            cells += [number(value), number(difference, signed=True)]
        table.rows.append(cells)
    return table


def boundary_table(boundaries: Mapping[str, Mapping[str, BoundaryMetric]], *, short: bool = False) -> Table:
    """The metrics of each boundary: final values, and medians over the whole run.

    Args:
        boundaries: The metrics of each boundary, by key.
        short: Leave out medians and secondary metrics, for a terminal.
    """
    keys = _columns(list(dict.fromkeys(key for by in boundaries.values() for key in by)), short)
    headings = ["boundary"]
    for key in keys:
        heading = _HEADINGS.get(key, key)
        headings += [heading] if short or key in _LAST else [heading, f"{heading}, median"]
    rows = [
        [name, *(cell for key in keys for cell in _cells(key, by.get(key), short))] for name, by in boundaries.items()
    ]
    return Table(headings, rows)


def _columns(logged: Sequence[str], short: bool) -> list[str]:
    """The metrics to show, in order."""
    first = [key for key in (_SHORT if short else _ORDER) if key in logged]
    unknown = [] if short else [key for key in logged if key not in (*_ORDER, *_LAST)]
    return [*first, *unknown, *(key for key in _LAST if key in logged)]


def _cells(key: str, metric: BoundaryMetric | None, short: bool) -> list[str]:
    """The cells of one metric of one boundary."""
    last, median = (None, None) if metric is None else (metric.final, metric.median)
    if key in _LAST:
        return [number(last if key == "cost" else median, percent=True)]
    return [number(last)] if short else [number(last), number(median)]


def number(value: float | None, *, signed: bool = False, percent: bool = False) -> str:
    """Formats a number with four significant digits; a dash stands for none.

    Args:
        value: The number.
        signed: Show a plus sign too.
        percent: Show a share in percent, with three digits.
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    return f"{100 * value:.3g} %" if percent else f"{value:+.4g}" if signed else f"{value:.4g}"


__all__ = ["Table", "boundary_table", "number", "value_table"]
