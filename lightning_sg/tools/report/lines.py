"""Series as lines in a figure: colours, smoothing, scales and labels."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from lightning_sg.tools.report.run import Series
from lightning_sg.tools.style import PALETTE

_FEW = 20  # a series with fewer values is drawn as it is, with markers
_MOST = 2000  # the most points in a smoothed line


def is_many(count: int) -> bool:
    """Whether there are more lines than the palette has colours."""
    return count > len(PALETTE)


def colours(count: int) -> list[str]:
    """A colour for each of ``count`` lines: distinct colours for a few, shades from dark to light for many."""
    if not is_many(count):
        return list(PALETTE[:count])
    shades = matplotlib.colormaps["viridis"]
    return [to_hex(shades(0.9 * place / (count - 1))) for place in range(count)]  # the yellow end is too pale


def shown(name: str, most: int = 30) -> str:
    """A name that a figure can show: one short line without control characters.

    Args:
        name: Any string.
        most: The most characters. Longer names keep their end, because that is where names differ.
    """
    text = "".join("�" if unicodedata.category(each)[0] == "C" else each for each in " ".join(name.split()))
    if len(text) > most:
        text = "…" + text[-(most - 1) :]
    # Matplotlib hides labels that begin with "_" from its legends; a hair space in front prevents that.
    return "\u200a" + text if text.startswith("_") else text or "(no name)"


def smooth(series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The running median over about 4 % of a series; a short series stays as it is.

    Args:
        series: The series. Medians ignore values that are not finite.

    Returns:
        Steps and values, two arrays of shape (points,).
    """
    steps, values = np.asarray(series.steps, np.float64), finite(series.values)
    if len(values) < _FEW:
        return steps, values
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        size = math.ceil(len(values) / _MOST)
        if size > 1:
            steps, values = _block_medians(steps, size), _block_medians(values, size)
        half = max(2, len(values) // 50)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, constant_values=np.nan), 2 * half + 1)
        return steps, np.nanmedian(windows, 1)


def _block_medians(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The median of each block of ``size`` values; the last block may be shorter."""
    padded = np.pad(values, (0, -len(values) % size), constant_values=np.nan)
    return np.asarray(np.nanmedian(padded.reshape(-1, size), 1))


def finite(values: Sequence[float]) -> NDArray[np.float64]:
    """The values as an array, with NaN in place of infinities, so that matplotlib leaves them out."""
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def plot(axes: Axes, series: Series, colour: str, *, raw: bool = True, dashed: bool = False) -> None:
    """Draws a series: a short one with markers, a long one as its running median over a thin line of raw values.

    Args:
        axes: The axes to draw in.
        series: The series.
        colour: The colour of both lines.
        raw: Draw the thin line too.
        dashed: Draw the main line dashed.
    """
    steps, values = smooth(series)
    style = "--" if dashed else "-"
    if len(series.values) < _FEW:
        axes.plot(steps, values, style, marker="o", markersize=3.5, linewidth=1.6, color=colour)
        return
    if raw:
        axes.plot(series.steps, finite(series.values), color=colour, alpha=0.25, linewidth=0.6, zorder=1.5)
    axes.plot(steps, values, style, color=colour, linewidth=1.8 if raw else 1.3, zorder=2.5)


def handle(colour: str, *, dashed: bool = False) -> Line2D:
    """A legend entry: a line without points."""
    return Line2D([], [], color=colour, linewidth=1.8, linestyle="--" if dashed else "-")


def scale(axes: Axes, series: Iterable[Series], direction: str = "y", factor: float = 10.0) -> bool:
    """Makes an axis logarithmic if its values span a large enough factor.

    Args:
        axes: The axes, already drawn in.
        series: Everything that is drawn in them.
        direction: ``"y"`` or ``"x"``.
        factor: The smallest ratio of largest to smallest value that calls for a logarithmic axis.

    Returns:
        Whether the axis is logarithmic now.
    """
    values = [value for each in series for value in each.finite()]
    positive = [value for value in values if value > 0]
    # A few zeros must not force a linear axis on the rest: an untrained predictor predicts exactly zero.
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
    """A remark on how many values a logarithmic axis cannot show; empty if it shows all."""
    count = sum(value <= 0 for each in series for value in each.finite())
    return f"{count} value(s) ≤ 0 not shown" if count else ""


__all__ = ["colours", "finite", "handle", "is_many", "not_shown", "plot", "scale", "shown", "smooth"]
