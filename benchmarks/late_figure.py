r"""Draws who wins where: the loss over the delay and over the number of stages.

    python -m benchmarks.accuracy --shakespeare FOLDER --tasks char-small --budget 0.4 --splits "4 stages" \
        --methods "late alone, NAdam, delay 5" ... --out benchmarks/late_map.jsonl
    python -m benchmarks.late_figure --records benchmarks/late_map.jsonl --out docs/pictures/late.png

The methods are those of :data:`SERIES` with the delays of :data:`DELAYS`, and :data:`LEVELS`, which know no delay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.runs import Record, read
from lightning_sg.tools.style import DPI, GREY, PALETTE, STYLE

#: Methods whose gradients have an age, with their colours.
SERIES = {
    "late alone, NAdam": PALETTE[2],
    "half late, NAdam": PALETTE[1],
    "0.2 late, NAdam": PALETTE[0],
}
#: Methods that know no delay; the first has no boundaries either.
LEVELS = {"backpropagation, NAdam": GREY, "synthetic gradients, NAdam": PALETTE[3], "local loss, NAdam": PALETTE[4]}
#: The default's name has no delay in it.
DELAYS = {", delay 0": 0, "": 1, ", delay 2": 2, ", delay 5": 5, ", delay 11": 11}
_METRIC = "val_loss"


def loss(records: Sequence[Record], method: str, split: str) -> float | None:
    """The mean loss of a method over its seeds; ``None`` if it was not trained."""
    found = [each["metrics"][_METRIC] for each in records if (each["method"], each["split"]) == (method, split)]
    return sum(found) / len(found) if found else None


def draw(records: Sequence[Record], path: Path) -> None:
    """Writes one PNG: the loss over the delay, and over the number of stages."""
    with plt.rc_context(STYLE):
        figure, (by_delay, by_depth) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, width_ratios=(3, 2))
        _by_delay(by_delay, records)
        _by_depth(by_depth, records)
        by_delay.set_ylabel("nats a character")
        by_delay.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _by_delay(axes: Axes, records: Sequence[Record]) -> None:
    for method, colour in LEVELS.items():
        level = loss(records, method, "whole" if method == next(iter(LEVELS)) else "4 stages")
        if level is not None:
            axes.axhline(level, color=colour, linestyle="--", label=method)
    for method, colour in SERIES.items():
        points = {delay: loss(records, method + words, "4 stages") for words, delay in DELAYS.items()}
        known = [(1 + delay, value) for delay, value in points.items() if value is not None]
        if known:
            axes.plot(*zip(*known), color=colour, marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 3, 6, 12], ["1", "2", "3", "6", "12"])
    axes.set_xlabel("batches that a true gradient ages at each boundary (1 + delay)")
    axes.set_title("four stages")


def _by_depth(axes: Axes, records: Sequence[Record]) -> None:
    whole = loss(records, next(iter(LEVELS)), "whole")
    for method, colour in {**LEVELS, **SERIES}.items():
        points = [(1, whole), (2, loss(records, method, "2 stages")), (4, loss(records, method, "4 stages"))]
        known = [(stages, value) for stages, value in points if value is not None]
        if len(known) > 1:
            axes.plot(*zip(*known), color=colour, marker="o", linestyle="--" if method in LEVELS else "-")
    axes.set_xticks([1, 2, 4])
    axes.set_xlabel("stages (delay 1)")
    axes.set_title("depth")


def main() -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="the file of benchmarks.accuracy")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args()
    draw(read(options.records), options.out)


if __name__ == "__main__":
    main()
