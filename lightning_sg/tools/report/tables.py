"""The tables of a report as text: the same on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_sg.tools.report.compare import Figure, Row
from lightning_sg.tools.report.read import Run

# Figures of a boundary in the order of the table; those logged beyond them follow.
_ORDER = ("cosine", "norm_ratio", "bias", "variance", "loss", "bootstrapped_cosine")
_HEADINGS = {"norm_ratio": "norm ratio", "bootstrapped_cosine": "cosine of the target", "guarded": "guarded"}


@dataclass
class Table:
    """Cells of text; the first column is of names, the others of numbers.

    Attributes:
        headings: One for each column.
        rows: The cells.
    """

    headings: list[str]
    rows: list[list[str]]


def value_table(run: Run, baselines: Sequence[Run], rows: Sequence[Row]) -> Table:
    """Final values: metric, run, then each baseline with the difference to it.

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


def boundary_table(boundaries: Mapping[str, Mapping[str, Figure]], *, short: bool = False) -> Table:
    """Each boundary's figures: at the end, and over the whole run.

    Args:
        boundaries: The figures.
        short: Leave out medians and secondary figures, for a terminal.
    """
    logged = list(dict.fromkeys(key for by in boundaries.values() for key in by))
    keys = [key for key in _ORDER if key in logged]
    if short:
        keys = [key for key in keys if key in _ORDER[:4]]
    else:
        keys += [key for key in logged if key not in (*_ORDER, "cost", "guarded")]
    keys += [key for key in ("cost", "guarded") if key in logged]
    headings = ["boundary"]
    for key in keys:
        heading = _HEADINGS.get(key, key)
        headings += [heading, f"{heading}, median"] if not short and key not in ("cost", "guarded") else [heading]
    rows = []
    for name, by in boundaries.items():
        cells = [name]
        for key in keys:
            figure = by.get(key)
            last, middle = (figure.final, figure.median) if figure else (None, None)
            if key == "cost":
                cells.append(number(last, percent=True))
            elif key == "guarded":
                cells.append(number(middle, percent=True))
            else:
                cells += [number(last)] if short else [number(last), number(middle)]
        rows.append(cells)
    return Table(headings, rows)


def number(value: float | None, *, signed: bool = False, percent: bool = False) -> str:
    """A number with four significant digits; a dash for none.

    Args:
        value: The number.
        signed: Show a plus too.
        percent: Show a share in percent, with three digits.
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    return f"{100 * value:.3g} %" if percent else f"{value:+.4g}" if signed else f"{value:.4g}"
