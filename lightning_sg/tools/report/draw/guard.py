"""When the alignment guard had taken over, at each boundary."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lightning_sg.tools.report.draw.panels import STEP, span
from lightning_sg.tools.report.lines import shown
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run, Series
from lightning_sg.tools.style import PALETTE, png

_COLOURS = {True: PALETTE[1], False: "#dce6ec"}
_LABELS = {True: "guard has taken over", False: "prediction is used"}


def draw_guard(run: Run) -> Picture | None:
    """Draws a row for each boundary that logged the state of its guard.

    Args:
        run: The run.

    Returns:
        The picture; ``None`` if no boundary has a guard.
    """
    guarded = {name: by["guarded"] for name, by in run.boundaries.items() if "guarded" in by}
    if not guarded:
        return None
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(guarded)), layout="constrained")
    axes = figure.subplots()
    stretches = [_stretches(series) for series in guarded.values()]
    for place, row in enumerate(stretches):
        _draw_row(axes, place, row)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(guarded)), labels=[shown(name) for name in guarded])
    axes.set_ylim(len(guarded) - 0.4, -0.6)  # the first boundary on top
    span(axes, [run])
    axes.set_xlabel(STEP)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.set_title("Alignment guard")
    handles = [Patch(color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, list(_LABELS.values()), loc="outside upper right", ncols=2)
    caption = "When the alignment guard had taken over from the predictor. Each logged state is drawn up to the next."
    if not any(on for row in stretches for _, _, on in row):
        caption += " It never did at a logged step."
    return Picture("events", "Guard", caption, png(figure))


def _draw_row(axes: Axes, place: int, stretches: list[tuple[float, float, bool]]) -> None:
    for state in (False, True):
        bars = [(begin, end - begin) for begin, end, on in stretches if on == state]
        axes.broken_barh(bars, (place - 0.35, 0.7), color=_COLOURS[state])


def _stretches(series: Series) -> list[tuple[float, float, bool]]:
    """Beginning, end and state of each stretch in which the state did not change."""
    last = series.steps[-1]
    gap = (last - series.steps[0]) / max(1, len(series.steps) - 1) or 1.0
    stretches: list[tuple[float, float, bool]] = []
    for step, value, end in zip(series.steps, series.values, [*series.steps[1:], last + gap]):
        on = value >= 0.5
        if stretches and stretches[-1][2] == on:
            stretches[-1] = (stretches[-1][0], end, on)
        else:
            stretches.append((step, end, on))
    return stretches


__all__ = ["draw_guard"]
