"""The figures of a report."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lightning_sg.tools.report.compare import boundary_figures, metric_names
from lightning_sg.tools.report.read import Run, Series
from lightning_sg.tools.report.style import (
    DPI,
    GREY,
    PALETTE,
    STYLE,
    colours,
    handle,
    is_many,
    not_shown,
    plot,
    scale,
    shown,
)

_STEP = "training step"
_MOST_PANELS = 40

# Title and axis label of the quantities that every boundary may log, in the order in which they are drawn.
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


@dataclass
class Picture:
    """A figure of the report.

    Attributes:
        name: The name of its file, without ending.
        title: Its heading.
        caption: How to read it.
        png: The image.
    """

    name: str
    title: str
    caption: str
    png: bytes


def draw(run: Run, baselines: Sequence[Run] = ()) -> list[Picture]:
    """Draws every figure for which something was logged.

    Args:
        run: The run.
        baselines: Those to compare it with; only their metrics are drawn.

    Returns:
        The figures, from the outside in: metrics, alignment over time, boundaries side by side, events.
    """
    # No pyplot: it keeps figures for a screen, and the user's program may have its own.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        pictures = [_metrics([run, *baselines]), _alignment(run), _side_by_side(run), _events(run)]
    return [picture for picture in pictures if picture is not None]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _panels(count: int, height: float, width: float = 11.0) -> tuple[Figure, list[Axes]]:
    """A figure with panels in two columns."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(width if count > 1 else 0.65 * width, rows * height + 0.5),
        layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06),
    )
    panels = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


# ---------------------------------------------------------------------- metrics, beside those of the baselines


def _metrics(runs: Sequence[Run]) -> Picture | None:
    names = metric_names(runs)
    # A single value has no course; it is in the table.
    courses = [name for name in names if any(len(run.metrics[name].steps) > 1 for run in runs if name in run.metrics)]
    chosen = (courses or names)[:_MOST_PANELS]
    if not chosen:
        return None
    figure, panels = _panels(len(chosen), 3.1)
    # Many baselines are one crowd: which is which no longer matters.
    many = is_many(len(runs))
    paint = [PALETTE[0]] + [GREY if many else colour for colour in PALETTE[1 : len(runs)]]
    paint += [GREY] * (len(runs) - len(paint))
    for axes, name in zip(panels, chosen):
        present = [(run, colour) for run, colour in zip(runs, paint) if name in run.metrics]
        for run, colour in reversed(present):  # the run itself on top
            plot(axes, run.metrics[name], colour, dashed=run is not runs[0], raw=not (many and run is not runs[0]))
        drawn = [run.metrics[name] for run, _ in present]
        lost = not_shown(drawn) if scale(axes, drawn) else ""
        _finish(axes, shown(name, 45), f"{shown(name)}{_unit(name)}", lost)
        _span(axes, runs)
    if len(runs) > 1:
        labels = [shown(run.label, 50) for run in runs]
        handles = [handle(colour, dashed=place > 0) for place, colour in enumerate(paint)]
        if many:
            labels, handles = [labels[0], f"{len(runs) - 1} baselines"], handles[:2]
        else:
            labels[1:] = [f"{each} (baseline)" for each in labels[1:]]
        figure.legend(handles, labels, loc="outside upper left", ncols=2 if len(labels) < 5 else 3)
    caption = (
        "Thick: the running median over 4 % of the logged values (5 at least); thin: the values themselves. Short "
        "courses are drawn value by value, with markers. All runs of a panel share its axes; a scale is logarithmic "
        "where the values span a factor of 10."
    )
    left = [name for name in names if name not in chosen]
    if left:
        caption += f" In the table only: {', '.join(left)}."
    return Picture("metrics", "Training and validation", caption, _png(figure))


def _unit(name: str) -> str:
    """A unit only where the name says it; metrics tell no units."""
    return " (%)" if "percent" in name else ""


def _span(axes: Axes, runs: Sequence[Run]) -> None:
    """The same steps in every panel: all those of the runs."""
    first, last = min(run.first_step for run in runs), max(run.last_step for run in runs)
    margin = 0.02 * (last - first) or 1
    axes.set_xlim(first - margin, last + margin)


def _finish(axes: Axes, title: str, label: str, lost: str = "") -> None:
    axes.set_title(title)
    axes.set_xlabel(_STEP)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if lost:
        axes.set_title(lost, loc="right", fontsize=8, fontweight="normal", color="#666666")


# ---------------------------------------------------------------------- alignment over time


def _alignment(run: Run) -> Picture | None:
    keys = [key for key in _QUANTITIES if key in run.quantities()]
    keys += [key for key in run.quantities() if key not in _QUANTITIES and key not in _NOT_OVER_TIME]
    if not keys:
        return None
    figure, panels = _panels(len(keys), 3.0)
    paint = dict(zip(run.boundaries, colours(len(run.boundaries))))
    many = is_many(len(paint))
    for axes, key in zip(panels, keys):
        present = {name: by[key] for name, by in run.boundaries.items() if key in by}
        for name, series in present.items():
            plot(axes, series, paint[name], raw=not many)
        title, label = _QUANTITIES.get(key, (shown(key), shown(key)))
        lost = ""
        if key in _COSINES:
            axes.axhline(0, color="#444444", linewidth=0.8)
            low = min((value for series in present.values() for value in series.finite()), default=0.0)
            axes.set_ylim(min(-0.1, max(low - 0.05, -1.02)), 1.02)
        else:
            # Bias and variance are parts of one error: they have the same scale, and below the same limits.
            together = _ERROR if key in _ERROR else (key,)
            if scale(axes, [by[each] for by in run.boundaries.values() for each in together if each in by]):
                lost = not_shown(present.values())
        if key == "norm_ratio":
            axes.axhline(1, color="#444444", linewidth=0.8)
        _finish(axes, title, label, lost)
        _span(axes, [run])
    errors = [axes for axes, key in zip(panels, keys) if key in _ERROR]
    if errors:
        limits = [limit for axes in errors for limit in axes.get_ylim()]
        for axes in errors:
            axes.set_ylim(min(limits), max(limits))
    _name_boundaries(figure, panels, list(paint), list(paint.values()))
    caption = (
        "Cosine: whether the prediction points where the target does; 0 is no better than chance. Size: the line at 1 "
        "is the target's own. Bias and variance, on the same axis, part the squared error by what happens to it in "
        "training: variance averages out over batches, bias does not and pushes the weights the wrong way at every "
        "step. A high cosine with a large bias can be worse than a lower one whose error is all variance. "
    )
    if "bootstrapped_cosine" in keys:
        caption += (
            "The target itself is in part a prediction where boundaries follow; its cosine with the exact gradient "
            "is measured on some batches only. "
        )
    caption += "Each line is a running median over 4 % of the logged values (5 at least)" + (
        "; with so many boundaries the values themselves are not drawn." if many else "; thin: the values themselves."
    )
    return Picture("alignment", "Alignment at each boundary over time", caption, _png(figure))


def _name_boundaries(figure: Figure, panels: list[Axes], names: list[str], paint: list[str]) -> None:
    """Says which colour is which boundary: a legend for a few, a colour bar for many."""
    labels = [shown(name) for name in names]
    if not is_many(len(names)):
        figure.legend([handle(colour) for colour in paint], labels, loc="outside upper left", ncols=min(len(names), 3))
        return
    norm = BoundaryNorm([place - 0.5 for place in range(len(names) + 1)], len(names))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(paint)), ax=panels, aspect=40, pad=0.02, shrink=0.9)
    every = math.ceil(len(names) / 40)  # more labels would overlap
    bar.set_ticks(list(range(0, len(names), every)), labels=labels[::every])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()  # the first boundary on top, as in the tables
    bar.set_label("boundary, in the order of the names")


# ---------------------------------------------------------------------- boundaries side by side


def _side_by_side(run: Run) -> Picture | None:
    keys = run.quantities()
    has = {"cosine": "cosine" in keys, "error": any(key in keys for key in _ERROR), "cost": "cost" in keys}
    kinds = [kind for kind, there in has.items() if there]
    if not kinds:
        return None
    figures = boundary_figures(run)
    names = list(run.boundaries)
    figure = Figure(figsize=(max(5.5, 1.5 + 3.6 * len(kinds)), 1.5 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    places = list(range(len(names)))
    for axes, kind in zip(panels, kinds):
        axes.grid(False, axis="y")
        if kind == "cosine":
            for place, name in enumerate(names):
                _range(axes, place, run.boundaries[name].get("cosine"))
                if "cosine" in figures[name]:
                    axes.plot(figures[name]["cosine"].final, place, "o", color=PALETTE[0], markersize=7)
            axes.axvline(0, color="#444444", linewidth=0.8)
            axes.set(xlabel="cosine of prediction and target", title="Cosine")
        elif kind == "error":
            drawn = []
            for key, colour, marker in zip(_ERROR, (PALETTE[1], PALETTE[0]), "oD"):
                points = [(figures[name][key].final, place) for place, name in enumerate(names) if key in figures[name]]
                axes.plot([x for x, _ in points], [y for _, y in points], marker, color=colour, markersize=6, label=key)
                drawn.append(Series(list(range(len(points))), [x for x, _ in points]))
            lost = not_shown(drawn) if scale(axes, drawn, "x") else ""
            axes.set(xlabel="‖error‖² / ‖target‖²", title="Bias and variance")
            axes.legend(loc="lower left", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1, handletextpad=0.1)
            if lost:
                axes.annotate(lost, (1, 0.01), xycoords="axes fraction", ha="right", fontsize=8, color="#666666")
        else:
            shares = [100 * figures[name]["cost"].final if "cost" in figures[name] else math.nan for name in names]
            axes.barh(places, shares, height=0.6, color=PALETTE[2])
            total = sum(share for share in shares if math.isfinite(share))
            axes.set(xlabel="share of the model's FLOPs per step (%)", title=f"Predictor's cost: {total:.3g} % in all")
            axes.margins(x=0.18)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            for place, share in zip(places, shares):
                if math.isfinite(share):
                    axes.annotate(
                        f"{share:.3g}", (share, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5
                    )
    panels[0].set_yticks(places, labels=[shown(name) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first boundary on top
    caption = "One row a boundary, in the order of their names. Dots: values at the end, medians of the last tenth. "
    if "cosine" in kinds:
        caption += "Line behind a cosine: the middle 80 % of all that was logged. "
    if "error" in kinds:
        caption += "Bias and variance add up to the squared error; predicting nothing at all has an error of about 1. "
    if "cost" in kinds:
        caption += "Cost: the predictor's FLOPs per step, as a share of those of the whole model."
    return Picture("boundaries", "Boundaries side by side", caption, _png(figure))


def _range(axes: Axes, place: int, series: Series | None) -> None:
    """A line over the middle 80 % of the values."""
    values = sorted(series.finite()) if series is not None else []
    if len(values) > 2:
        tenth = len(values) // 10
        ends = [values[tenth], values[-1 - tenth]]
        axes.plot(ends, [place, place], color=PALETTE[0], alpha=0.3, linewidth=5, solid_capstyle="round")


# ---------------------------------------------------------------------- events


def _events(run: Run) -> Picture | None:
    guarded = {name: by["guarded"] for name, by in run.boundaries.items() if "guarded" in by}
    if not guarded:
        return None
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(guarded)), layout="constrained")
    axes = figure.subplots()
    ever = False
    for place, series in enumerate(guarded.values()):
        spans = _spans(series)
        for state, colour in ((False, "#dce6ec"), (True, PALETTE[1])):
            axes.broken_barh(
                [(begin, end - begin) for begin, end, on in spans if on == state], (place - 0.35, 0.7), color=colour
            )
        ever |= any(on for _, _, on in spans)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(guarded)), labels=[shown(name) for name in guarded])
    axes.set_ylim(len(guarded) - 0.4, -0.6)
    _span(axes, [run])
    axes.set_xlabel(_STEP)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.set_title("Alignment guard")
    figure.legend(
        [Patch(color=PALETTE[1]), Patch(color="#dce6ec")],
        ["guard has taken over", "prediction is used"],
        loc="outside upper right",
        ncols=2,
    )
    caption = "When the alignment guard had taken over from the predictor. Each logged state is drawn until the next. "
    caption += "" if ever else "It never did at a logged step."
    return Picture("events", "Guard", caption, _png(figure))


def _spans(series: Series) -> list[tuple[float, float, bool]]:
    """Begin, end and state of each stretch of one state."""
    last = series.steps[-1]
    gap = (last - series.steps[0]) / max(1, len(series.steps) - 1) or 1.0
    spans: list[tuple[float, float, bool]] = []
    for step, value, end in zip(series.steps, series.values, [*series.steps[1:], last + gap]):
        on = value >= 0.5
        if spans and spans[-1][2] == on:
            spans[-1] = (spans[-1][0], end, on)
        else:
            spans.append((step, end, on))
    return spans
