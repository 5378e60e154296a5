"""The look that all pictures of the tools share, and how they become PNG images."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

# The colours of Okabe and Ito, which people with any colour vision can tell apart. Their yellow is left out: it is too
# pale for a line on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
GREY = "#8a8a8a"
DPI = 130

STYLE: Any = {  # Any: only newer releases of matplotlib have a type for the keys
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
    # Names come from the user's model, where "$" does not start a formula.
    "text.parse_math": False,
}


def png(figure: Figure) -> bytes:
    """The figure as a PNG image: the same bytes from every release of matplotlib that draws the same pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


__all__ = ["DPI", "GREY", "PALETTE", "STYLE", "png"]
