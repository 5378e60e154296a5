"""What the figures have in common: colours, smoothing, scales and the text in them."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from lightning_sg.tools.report.read import Series

# Okabe and Ito's, told apart with any colour vision; without their yellow, too pale for a line on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
GREY = "#8a8a8a"
DPI = 130

STYLE: Any = {  # newer releases of matplotlib type the keys, older ones do not
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    # Names come from the user's model: a "$" in one is no formula.
    "text.parse_math": False,
}

_FEW = 20  # values that are drawn as they are, each with its marker
_MOST = 2000  # values that a smoothed line has at most


def is_many(count: int) -> bool:
    """Whether there are more lines than colours that can be told apart."""
    return count > len(PALETTE)


def colours(count: int) -> list[str]:
    """A colour for each of ``count`` lines: distinct ones for a few, a sequence from dark to light for many."""
    if not is_many(count):
        return list(PALETTE[:count])
    shades = matplotlib.colormaps["viridis"]
    return [to_hex(shades(0.9 * place / (count - 1))) for place in range(count)]  # its yellow end is too pale


def shown(name: str, most: int = 30) -> str:
    """A name as a figure can show it: one line, short, and with nothing that cannot be drawn.

    Args:
        name: Any string.
        most: How many characters at most; of longer names the end is shown, where they differ.
    """
    text = "".join("�" if unicodedata.category(each)[0] == "C" else each for each in " ".join(name.split()))
    if len(text) > most:
        text = "…" + text[-(most - 1) :]
    # Matplotlib leaves labels that begin with "_" out of its legends.
    return "\u200a" + text if text.startswith("_") else text or "(no name)"


def smooth(series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The running median over about a twenty-fifth of a series; a short series as it is.

    Args:
        series: The series; what is not finite in it is passed over.

    Returns:
        Steps and values.
    """
    steps, values = np.asarray(series.steps, np.float64), finite(series.values)
    if len(values) < _FEW:
        return steps, values
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        if len(values) > _MOST:
            block = math.ceil(len(values) / _MOST)
            pad = -len(values) % block
            steps = np.nanmedian(np.pad(steps, (0, pad), constant_values=np.nan).reshape(-1, block), 1)
            values = np.nanmedian(np.pad(values, (0, pad), constant_values=np.nan).reshape(-1, block), 1)
        half = max(2, len(values) // 50)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, constant_values=np.nan), 2 * half + 1)
        return steps, np.nanmedian(windows, 1)


def finite(values: Sequence[float]) -> NDArray[np.float64]:
    """The values as an array, with NaN, which is not drawn, for infinity."""
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def plot(axes: Axes, series: Series, colour: str, *, raw: bool = True, dashed: bool = False) -> None:
    """Draws a series: a short one with markers; of a long one the running median, and thinly what it is of.

    Args:
        axes: Where.
        series: What.
        colour: In which colour.
        raw: Draw the values themselves too.
        dashed: Draw the line dashed.
    """
    steps, values = smooth(series)
    if len(series.values) < _FEW:
        axes.plot(steps, values, "--" if dashed else "-", marker="o", markersize=3.5, linewidth=1.6, color=colour)
        return
    if raw:
        axes.plot(series.steps, finite(series.values), color=colour, alpha=0.25, linewidth=0.6, zorder=1.5)
    axes.plot(steps, values, "--" if dashed else "-", color=colour, linewidth=1.8 if raw else 1.3, zorder=2.5)


def handle(colour: str, *, dashed: bool = False) -> Line2D:
    """A line for a legend."""
    return Line2D([], [], color=colour, linewidth=1.8, linestyle="--" if dashed else "-")


def scale(axes: Axes, series: Iterable[Series], direction: str = "y", factor: float = 10.0) -> bool:
    """Makes an axis logarithmic if the values on it ask for it.

    Args:
        axes: The axes, drawn.
        series: What is drawn in them.
        direction: ``"y"`` or ``"x"``.
        factor: The ratio of largest to smallest value from which on it is.

    Returns:
        Whether it is logarithmic now.
    """
    values = [value for each in series for value in each.finite()]
    positive = [value for value in values if value > 0]
    # A few zeros are no reason to squeeze the rest: an untrained predictor predicts exactly zero.
    if not positive or max(positive) / min(positive) < factor or len(positive) < 0.95 * len(values):
        return False
    axis = axes.yaxis if direction == "y" else axes.xaxis
    (axes.set_yscale if direction == "y" else axes.set_xscale)("log", nonpositive="mask")
    decades = math.log10(max(positive) / min(positive))
    steps = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    return True


def not_shown(series: Iterable[Series]) -> str:
    """What must be said of series on a logarithmic axis: how many values are not there, or nothing."""
    count = sum(value <= 0 for each in series for value in each.finite())
    return f"{count} value(s) ≤ 0 not shown" if count else ""
