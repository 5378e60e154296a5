"""The alignment of predictions and targets at every boundary, over training steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from lightning_sg.tools.report.draw.panels import DARK, finish, panels, span
from lightning_sg.tools.report.lines import colours, handle, is_many, not_shown, plot, scale, shown
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run, Series
from lightning_sg.tools.style import png

# Title and axis label of the metrics that every boundary may log, in the order in which they are drawn.
_QUANTITIES = {
    "cosine": ("Cosine", "cosine of prediction and target"),
    "norm_ratio": ("Size", "norm of prediction / norm of target"),
    "bias": ("Bias", "‖mean error‖² / ‖target‖²"),
    "variance": ("Variance", "rest of ‖error‖² / ‖target‖²"),
    "bootstrapped_cosine": ("Cosine of the target itself", "cosine of target and exact gradient"),
    "loss": ("Predictor's loss", "training loss of the predictor"),
}
_NOT_OVER_TIME = {"cost", "guarded"}
_COSINES = ("cosine", "bootstrapped_cosine")
_ERROR = ("bias", "variance")
_MOST_LABELS = 40  # more beside a colour bar would overlap


def draw_alignment(run: Run) -> Picture | None:
    """Draws a panel for each metric of the boundaries, with a line for each boundary.

    Args:
        run: The run.

    Returns:
        The picture; ``None`` if the run has nothing to draw over time.
    """
    logged = run.quantities()
    keys = [key for key in _QUANTITIES if key in logged]
    keys += [key for key in logged if key not in _QUANTITIES and key not in _NOT_OVER_TIME]
    if not keys:
        return None
    figure, places = panels(len(keys), 3.0)
    paint = dict(zip(run.boundaries, colours(len(run.boundaries))))
    for axes, key in zip(places, keys):
        _panel(axes, key, run, paint)
    _share_limits([axes for axes, key in zip(places, keys) if key in _ERROR])
    _name_boundaries(figure, places, list(paint), list(paint.values()))
    caption = _caption("bootstrapped_cosine" in keys, is_many(len(paint)))
    return Picture("alignment", "Alignment at each boundary over time", caption, png(figure))


def _panel(axes: Axes, key: str, run: Run, paint: Mapping[str, str]) -> None:
    present = {name: by[key] for name, by in run.boundaries.items() if key in by}
    for name, series in present.items():
        plot(axes, series, paint[name], raw=not is_many(len(paint)))
    lost = ""
    if key in _COSINES:
        _scale_cosine(axes, present.values())
    elif scale(axes, _on_same_scale(key, run)):
        lost = not_shown(present.values())
    if key == "norm_ratio":
        axes.axhline(1, color=DARK, linewidth=0.8)
    title, label = _QUANTITIES.get(key, (shown(key), shown(key)))
    finish(axes, title, label, lost)
    span(axes, [run])


def _scale_cosine(axes: Axes, series: Iterable[Series]) -> None:
    """Shows 0 to 1, and as much below 0 as the values need."""
    axes.axhline(0, color=DARK, linewidth=0.8)
    low = min((value for each in series for value in each.finite()), default=0.0)
    axes.set_ylim(min(-0.1, max(low - 0.05, -1.02)), 1.02)


def _on_same_scale(key: str, run: Run) -> list[Series]:
    """The series that decide together whether an axis is logarithmic: bias and variance are parts of one error."""
    together = _ERROR if key in _ERROR else (key,)
    return [by[each] for by in run.boundaries.values() for each in together if each in by]


def _share_limits(panels: Sequence[Axes]) -> None:
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    for axes in panels:
        axes.set_ylim(min(limits), max(limits))


def _name_boundaries(figure: Figure, panels: list[Axes], names: list[str], paint: list[str]) -> None:
    """Shows which colour is which boundary: a legend for a few boundaries, a colour bar for many."""
    labels = [shown(name) for name in names]
    if not is_many(len(names)):
        figure.legend([handle(colour) for colour in paint], labels, loc="outside upper left", ncols=min(len(names), 3))
        return
    norm = BoundaryNorm([place - 0.5 for place in range(len(names) + 1)], len(names))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(paint)), ax=panels, aspect=40, pad=0.02, shrink=0.9)
    every = math.ceil(len(names) / _MOST_LABELS)
    bar.set_ticks(list(range(0, len(names), every)), labels=labels[::every])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()  # the first boundary on top, as in the tables
    bar.set_label("boundary, in the order of the names")


def _caption(bootstrapped: bool, many: bool) -> str:
    caption = (
        "Cosine: whether the prediction points the same way as the target; 0 is no better than chance. Size: the line "
        "at 1 is the size of the target. Bias and variance, on the same axis, are the two parts of the squared error: "
        "variance averages out over batches; bias does not, and pushes the weights the wrong way at every step. A high "
        "cosine with a large bias can be worse than a lower one whose error is all variance. "
    )
    if bootstrapped:
        caption += (
            "Where more boundaries follow, the target itself is partly a prediction; its cosine with the exact "
            "gradient is measured on some batches only. "
        )
    return caption + (
        "Each line is a running median over 4 % of the logged values (at least 5)"
        + ("; with this many boundaries the values themselves are not drawn." if many else "; thin: the values.")
    )


__all__ = ["draw_alignment"]
