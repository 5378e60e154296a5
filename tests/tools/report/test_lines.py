"""Series as lines: logarithmic axes and smoothing."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from lightning_sg.tools.report.lines import not_shown, scale, smooth
from lightning_sg.tools.report.run import Series


def test_axis_is_logarithmic_if_the_values_span_a_factor_of_ten():
    axes = Figure().subplots()
    wide = Series(list(range(100)), [0.0, *(10.0 ** (place % 4) for place in range(99))])
    assert not scale(axes, [Series([0, 1], [1.0, 9.0])])
    assert not scale(axes, [Series([0, 1], [0.0, 900.0])])
    assert not scale(axes, [Series([0, 1], [-1.0, math.nan])])
    assert axes.get_yscale() == "linear"
    assert scale(axes, [wide])
    assert axes.get_yscale() == "log"
    assert not_shown([wide]) == "1 value(s) ≤ 0 not shown"


def test_smoothed_lines_are_short_and_ignore_nan():
    few = Series([0, 1, 2], [1.0, math.inf, 3.0])
    assert str(smooth(few)[1].tolist()) == "[1.0, nan, 3.0]"
    spiky = Series(
        list(range(100_001)), [math.nan if step % 7 == 0 else float(step % 50 == 1) for step in range(100_001)]
    )
    steps, values = smooth(spiky)
    assert len(steps) == len(values) <= 2000
    assert (steps[1:] > steps[:-1]).all()
    assert (values == 0).all()
