"""The metrics of a run over seconds, what a step takes, and how much of it processes wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from lightning_sg.tools.report.compare import metric_names
from lightning_sg.tools.report.draw.metrics import legend, paint_of, several_values
from lightning_sg.tools.report.draw.panels import finish, panels
from lightning_sg.tools.report.lines import is_many, not_shown, plot, scale, shown
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run, Series
from lightning_sg.tools.report.times import STEP_MS, WAITING, over_seconds, step_milliseconds
from lightning_sg.tools.style import png

SECONDS = "seconds since training began"
_MOST = 6  # panels of metrics
_WAITING = ("Waiting", "share of the processes' time")

_CAPTION = (
    "The same values over time: what is to be judged where a split makes steps faster and each of them less good. "
    "Seconds include validation and checkpoints. "
)
_LOGGED = "Milliseconds a step are the mean since the last logged step, without validation. "
_DERIVED = "Where a run has not logged them, milliseconds a step are from the log's clock, with validation in them. "
_WAITS = "Waiting: the share of their time in which processes wait for each other or send, the mean of all. "


def draw_time(runs: Sequence[Run]) -> Picture | None:
    """Draws metrics over seconds, then milliseconds a step and the share of waiting over steps.

    Args:
        runs: The run, then its baselines.

    Returns:
        The picture; ``None`` if the run's log has no times.
    """
    timed = [run for run in runs if run.seconds.steps]
    if runs[0] not in timed:
        return None
    names = [name for name in several_values(metric_names(timed), timed) if not name.startswith("sg/")][:_MOST]
    waits = any(WAITING in run.metrics for run in timed)
    figure, places = panels(len(names) + 1 + waits, 3.1)
    paint = dict(zip(map(id, runs), paint_of(len(runs))))

    def draw(
        axes: Axes, find: Callable[[Run], Series | None], titles: tuple[str, str], axis: str | None = None
    ) -> None:
        found = [(run, series) for run in timed if (series := find(run)) is not None and series.steps]
        for run, series in reversed(found):  # the run itself last, on top
            baseline = run is not runs[0]
            plot(axes, series, paint[id(run)], dashed=baseline, raw=not (is_many(len(runs)) and baseline))
        drawn = [series for _, series in found]
        share = titles == _WAITING  # from zero on
        lost = not_shown(drawn) if not share and scale(axes, drawn) else ""
        finish(axes, *titles, lost, axis)

    for axes, name in zip(places, names):
        find = _over_seconds(name)
        draw(axes, find, (shown(name, 45), shown(name)), SECONDS)
    draw(places[len(names)], step_milliseconds, ("Time of a step", "ms a step"))
    if waits:
        draw(places[-1], lambda run: run.metrics.get(WAITING), _WAITING)
        places[-1].set_ylim(0, max(0.1, places[-1].get_ylim()[1]))
    if len(runs) > 1:
        legend(figure, runs, list(paint.values()))
    derived = _DERIVED if any(STEP_MS not in run.metrics for run in timed) else ""
    missing = [run.label for run in runs if run not in timed]
    caption = _CAPTION + _LOGGED + derived + (_WAITS if waits else "")
    caption += f"Without times in the log, and so not drawn: {', '.join(missing)}." if missing else ""
    return Picture("time", "Over time", caption.rstrip(), png(figure))


def _over_seconds(name: str) -> Callable[[Run], Series | None]:
    return lambda run: over_seconds(run.metrics[name], run) if name in run.metrics else None


__all__ = ["draw_time"]
