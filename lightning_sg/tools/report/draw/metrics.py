"""The metrics of a run over training steps, beside those of its baselines."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_sg.tools.report.compare import metric_names
from lightning_sg.tools.report.draw.panels import finish, panels, span
from lightning_sg.tools.report.lines import handle, is_many, not_shown, plot, scale, shown
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run
from lightning_sg.tools.report.times import STEP_MS, WAITING
from lightning_sg.tools.style import GREY, PALETTE, png

_MOST_PANELS = 40

_CAPTION = (
    "Thick lines: running medians over 4 % of the logged values (at least 5); thin lines: the values themselves. Short "
    "series are drawn value by value, with markers. All runs in a panel share its axes; an axis is logarithmic where "
    "the values span a factor of 10."
)


def draw_metrics(runs: Sequence[Run]) -> Picture | None:
    """Draws a panel for each metric.

    Args:
        runs: The run, then its baselines.

    Returns:
        The picture; ``None`` if no run has metrics.
    """
    names = metric_names(runs)
    chosen = _drawn(names, runs)
    if not chosen:
        return None
    figure, places = panels(len(chosen), 3.1)
    paint = paint_of(len(runs))
    for axes, name in zip(places, chosen):
        _panel(axes, name, runs, paint)
    if len(runs) > 1:
        legend(figure, runs, paint)
    left = [name for name in names if name not in chosen]
    caption = _CAPTION + (f" Only in the table: {', '.join(left)}." if left else "")
    return Picture("metrics", "Training and validation", caption, png(figure))


def _drawn(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The metrics to draw. Those with a single value are only in the table, unless there are no others."""
    over_time = [name for name in names if name not in (STEP_MS, WAITING)]  # they have their own picture
    return list(several_values(over_time, runs) or over_time)[:_MOST_PANELS]


def several_values(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Those of the metrics of which some run has more than one value."""
    return [name for name in names if any(len(run.metrics[name].steps) > 1 for run in runs if name in run.metrics)]


def paint_of(count: int) -> list[str]:
    """A colour for the run and each baseline. Many baselines are all grey: which is which no longer matters."""
    if is_many(count):
        return [PALETTE[0]] + [GREY] * (count - 1)
    return list(PALETTE[:count])


def _panel(axes: Axes, name: str, runs: Sequence[Run], paint: Sequence[str]) -> None:
    many = is_many(len(runs))
    present = [(run, colour) for run, colour in zip(runs, paint) if name in run.metrics]
    for run, colour in reversed(present):  # the run itself last, on top
        baseline = run is not runs[0]
        plot(axes, run.metrics[name], colour, dashed=baseline, raw=not (many and baseline))
    drawn = [run.metrics[name] for run, _ in present]
    lost = not_shown(drawn) if scale(axes, drawn) else ""
    unit = " (%)" if "percent" in name else ""  # a metric has no unit but what its name says
    finish(axes, shown(name, 45), f"{shown(name)}{unit}", lost)
    span(axes, runs)


def legend(figure: Figure, runs: Sequence[Run], paint: Sequence[str]) -> None:
    """Shows which line is which run."""
    labels = [shown(run.label, 50) for run in runs]
    handles = [handle(colour, dashed=place > 0) for place, colour in enumerate(paint)]
    if is_many(len(runs)):
        labels, handles = [labels[0], f"{len(runs) - 1} baselines"], handles[:2]
    else:
        labels[1:] = [f"{each} (baseline)" for each in labels[1:]]
    figure.legend(handles, labels, loc="outside upper left", ncols=2 if len(labels) < 5 else 3)


__all__ = ["draw_metrics", "legend", "paint_of", "several_values"]
