"""The boundaries side by side: cosine, error and cost at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_sg.tools.report.compare import BoundaryMetric, boundary_metrics
from lightning_sg.tools.report.draw.panels import DARK, DIM
from lightning_sg.tools.report.lines import not_shown, scale, shown
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run, Series
from lightning_sg.tools.style import PALETTE, png

_CAPTION = "One row for each boundary, in the order of their names. Dots: final values, medians of the last tenth. "


def draw_boundaries(run: Run) -> Picture | None:
    """Draws a row for each boundary and a panel for each of cosine, error and cost that was logged.

    Args:
        run: The run.

    Returns:
        The picture; ``None`` if none of the three was logged.
    """
    logged = run.quantities()
    kinds = [kind for kind in _PANELS if any(key in logged for key in kind.keys)]
    if not kinds:
        return None
    names, metrics = list(run.boundaries), boundary_metrics(run)
    figure = Figure(figsize=(max(5.5, 1.5 + 3.6 * len(kinds)), 1.5 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds):
        axes.grid(False, axis="y")
        kind.draw(axes, run, metrics)
    panels[0].set_yticks(list(range(len(names))), labels=[shown(name) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first boundary on top
    caption = (_CAPTION + "".join(kind.caption for kind in kinds)).rstrip()
    return Picture("boundaries", "Boundaries side by side", caption, png(figure))


_Metrics = Mapping[str, Mapping[str, BoundaryMetric]]


def _draw_cosine(axes: Axes, run: Run, metrics: _Metrics) -> None:
    for place, (name, by) in enumerate(metrics.items()):
        if "cosine" in by:
            _draw_range(axes, place, run.boundaries[name]["cosine"])
            axes.plot(by["cosine"].final, place, "o", color=PALETTE[0], markersize=7)
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set(xlabel="cosine of prediction and target", title="Cosine")


def _draw_range(axes: Axes, place: int, series: Series) -> None:
    """A line over the middle 80 % of the values."""
    values = sorted(series.finite())
    if len(values) > 2:
        tenth = len(values) // 10
        ends = [values[tenth], values[-1 - tenth]]
        axes.plot(ends, [place, place], color=PALETTE[0], alpha=0.3, linewidth=5, solid_capstyle="round")


def _draw_error(axes: Axes, _run: Run, metrics: _Metrics) -> None:
    drawn = []
    for key, colour, marker in (("bias", PALETTE[1], "o"), ("variance", PALETTE[0], "D")):
        points = {place: by[key].final for place, by in enumerate(metrics.values()) if key in by}
        values = list(points.values())
        axes.plot(values, list(points), marker, color=colour, markersize=6, label=key)
        drawn.append(Series(list(points), values))
    lost = not_shown(drawn) if scale(axes, drawn, "x") else ""
    axes.set(xlabel="‖error‖² / ‖target‖²", title="Bias and variance")
    axes.legend(loc="lower left", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1, handletextpad=0.1)
    if lost:
        axes.annotate(lost, (1, 0.01), xycoords="axes fraction", ha="right", fontsize=8, color=DIM)


def _draw_cost(axes: Axes, _run: Run, metrics: _Metrics) -> None:
    shares = [100 * by["cost"].final if "cost" in by else math.nan for by in metrics.values()]
    axes.barh(range(len(shares)), shares, height=0.6, color=PALETTE[2])
    total = sum(share for share in shares if math.isfinite(share))
    axes.set(xlabel="share of the model's FLOPs per step (%)", title=f"Predictor's cost: {total:.3g} % in all")
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    for place, share in enumerate(shares):
        if math.isfinite(share):
            axes.annotate(f"{share:.3g}", (share, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)


@dataclass(frozen=True)
class _Panel:
    """One kind of panel: the metrics that it shows, how it is drawn, and what the caption says of it."""

    keys: tuple[str, ...]
    draw: Callable[[Axes, Run, _Metrics], None]
    caption: str


_PANELS = (
    _Panel(("cosine",), _draw_cosine, "Line behind a cosine: the middle 80 % of all logged values. "),
    _Panel(
        ("bias", "variance"),
        _draw_error,
        "Bias and variance add up to the squared error; predicting zero would have an error of about 1. ",
    ),
    _Panel(("cost",), _draw_cost, "Cost: the predictor's FLOPs per step as a share of the whole model's. "),
)

__all__ = ["draw_boundaries"]
