"""Figures with panels over training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lightning_sg.tools.report.run import Run

STEP = "training step"
DARK = "#444444"  # lines that mark a reference value
DIM = "#666666"  # remarks


def panels(count: int, height: float, width: float = 11.0) -> tuple[Figure, list[Axes]]:
    """Makes a figure with panels in two columns.

    Args:
        count: The number of panels.
        height: The height of a row, in inches.
        width: The width of the figure, in inches; a single panel gets less.
    """
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(width if count > 1 else 0.65 * width, rows * height + 0.5),
        layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06),
    )
    found = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in found[count:]:
        axes.set_visible(False)
    return figure, found[:count]


def finish(axes: Axes, title: str, label: str, lost: str = "", along: str | None = None) -> None:
    """Writes the title, the axis labels, and a remark on values that the axis cannot show.

    Args:
        axes: The axes, already drawn in.
        title: The title.
        label: What is drawn.
        lost: The remark.
        along: What it is drawn over; by default training steps.
    """
    axes.set_title(title)
    axes.set_xlabel(along or STEP)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=along is None))
    if lost:
        axes.set_title(lost, loc="right", fontsize=8, fontweight="normal", color=DIM)


def span(axes: Axes, runs: Sequence[Run]) -> None:
    """Shows all steps of the runs, so that panels share their x-axis."""
    first, last = min(run.first_step for run in runs), max(run.last_step for run in runs)
    margin = 0.02 * (last - first) or 1
    axes.set_xlim(first - margin, last + margin)


__all__ = ["DARK", "DIM", "STEP", "finish", "panels", "span"]
