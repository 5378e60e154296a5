"""When a run did its steps: from the seconds that it has logged, or from the clock of its logger."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, MutableMapping

from lightning_sg.tools.report.run import Run, Series

#: The columns that hold seconds since training began: this package's, and that of Lightning's ThroughputMonitor.
_COLUMNS = ("sg/seconds", "train|time")
STEP_MS, WAITING = "sg/step_ms", "sg/waiting"


def take_seconds(points: MutableMapping[str, dict[int, float]], clock: Mapping[int, float] | None = None) -> Series:
    """Takes the seconds out of what was logged.

    Args:
        points: Values by name and step. Columns of seconds are removed.
        clock: When the logger wrote what belongs to a step, in seconds, if the log says that.

    Returns:
        Seconds since training began by step; empty if nobody knows.
    """
    found: Mapping[int, float] = {}
    for column in reversed(_COLUMNS):
        found = points.pop(column, {}) or found
    if not found and clock:
        begun = min(clock.values())
        found = {step: when - begun for step, when in clock.items()}
    return _one_after_another(Series.of({step: value for step, value in found.items() if math.isfinite(value)}))


def _one_after_another(series: Series) -> Series:
    """Seconds that never fall: a run that was resumed in the same log counts from zero again."""
    before = lost = 0.0
    values = []
    for value in series.values:
        lost += max(0.0, before - (value + lost))
        before = value + lost
        values.append(before)
    return Series(series.steps, values)


def over_seconds(series: Series, run: Run) -> Series:
    """A series over seconds in place of steps, between the steps whose times are known.

    Args:
        series: A series of the run.
        run: The run; it has seconds.
    """
    steps, seconds = run.seconds.steps, run.seconds.values
    found = []
    for step in series.steps:
        place = min(max(bisect_left(steps, step), 1), len(steps) - 1) if len(steps) > 1 else 0
        if not place:
            found.append(seconds[0])
            continue
        (left, right), (early, late) = steps[place - 1 : place + 1], seconds[place - 1 : place + 1]
        share = min(max((step - left) / (right - left), 0.0), 1.0)
        found.append(early + share * (late - early))
    return Series(found, series.values)


def step_milliseconds(run: Run) -> Series:
    """Milliseconds a step over steps: as logged, or from the times of steps that follow each other in the log.

    In the second case the time of validations and checkpoints is in it.
    """
    if STEP_MS in run.metrics:
        return run.metrics[STEP_MS]
    known = list(zip(run.seconds.steps, run.seconds.values))
    pairs = [(after, before) for before, after in itertools.pairwise(known)]
    return Series([a[0] for a, _ in pairs], [1000 * (a[1] - b[1]) / (a[0] - b[0]) for a, b in pairs])


__all__ = ["STEP_MS", "WAITING", "over_seconds", "step_milliseconds", "take_seconds"]
