"""Draws the throughput benchmark's records."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.contestants import COPIES, DELAYED, ONE, OURS, SINGLE
from benchmarks.throughput_tables import link_of, ratio, speeds_of
from lightning_sg.tools.style import DPI, GREY, PALETTE, STYLE

Record = dict[str, Any]

# What has a colour of its own, over all panels; of the schedules, each with its best number of microbatches.
_COLOURS = {
    OURS: PALETTE[0],
    "zero bubble": PALETTE[1],
    "1F1B": PALETTE[5],
    "GPipe": PALETTE[3],
    DELAYED: PALETTE[2],
    "DDP": PALETTE[4],
    "naive": GREY,
}


def draw(records: list[Record], path: Path) -> None:
    """Writes one PNG: bars for the rows on this machine, lines for the emulated ones and the slow links."""
    bars = [record for record in records if record["row"] in "abcd"]
    emulated = sorted((record for record in records if record["row"] == "e"), key=lambda record: record["stages"])
    links = {row: [record for record in records if record["row"] == row] for row in ("f-rate", "f-latency")}
    panels: list[Callable[[Axes], None]] = []
    if bars:
        panels.append(lambda axes: _bars(axes, bars))
    if emulated:
        panels.append(lambda axes: _emulated(axes, emulated))
    panels += [lambda axes, found=found: _links(axes, found) for found in links.values() if found]  # type: ignore[misc]
    with plt.rc_context(STYLE):
        figure, places = plt.subplots(len(panels), 1, figsize=(9, 3.6 * len(panels)), squeeze=False)
        for panel, axes in zip(panels, places[:, 0]):
            panel(axes)
        figure.tight_layout()
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def wrap(text: str, width: int) -> str:
    """A text in lines of at most so many characters."""
    return "\n".join(textwrap.wrap(text, width))


def kind_of(name: str) -> str | None:
    """What a contestant is drawn as; ``None`` for those that have no place in the figure."""
    if name in (*SINGLE, COPIES) or (name.startswith(OURS) and name != OURS):
        return None
    if name in _COLOURS:
        return name
    schedule = re.sub(r", M=\d+$", "", name)
    return next((kind for kind in ("zero bubble", "1F1B", "GPipe") if kind in schedule), None)


def best(record: Record, to: str) -> dict[str, float]:
    """The best of each kind, over ``to``."""
    speeds = speeds_of(record)
    found: dict[str, float] = {}
    for name in speeds:
        kind, value = kind_of(name), ratio(speeds, name, to)
        if kind is not None and value is not None:
            found[kind] = max(value, found.get(kind, 0.0))
    return found


def _bars(axes: Axes, records: list[Record]) -> None:
    kinds = [kind for kind in _COLOURS if any(kind in best(record, COPIES) for record in records)]
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        shift = (place - (len(kinds) - 1) / 2) * width
        found = [
            (group + shift, best(record, COPIES)[kind])
            for group, record in enumerate(records)
            if kind in best(record, COPIES)
        ]
        bars = axes.bar(*zip(*found), width, label=kind, color=_COLOURS[kind])
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(records)), [wrap(record["title"], 24) for record in records], fontsize=8)
    axes.set_ylabel("of the ceiling")
    axes.set_title("Two processes; of schedules, the best number of microbatches")
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=len(kinds), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _emulated(axes: Axes, records: list[Record]) -> None:
    stages = [record["stages"] for record in records]
    axes.plot(stages, stages, color=GREY, linestyle="--", linewidth=1, label="ideal")
    for kind, colour in _COLOURS.items():
        points = [(record["stages"], best(record, ONE)[kind]) for record in records if kind in best(record, ONE)]
        if points:
            axes.plot(*zip(*points), marker="o", color=colour, label=kind)
    axes.set_xticks(stages)
    axes.set_xlabel("stages, which sleep in place of computing")
    axes.set_ylabel("over one process")
    axes.set_title("Emulated stages; schedules with up to 4 microbatches a stage")
    axes.legend(fontsize=8)


def _links(axes: Axes, records: list[Record]) -> None:
    names = [name for name in speeds_of(records[0]) if name not in SINGLE]
    for name in names:
        kind = kind_of(name)
        if kind is None and not name.startswith((f"{OURS}, wire", f"{OURS}, delay")):
            continue
        # What was not measured is a gap.
        values = [ratio(speeds_of(record), name, ONE) or math.nan for record in records]
        style = "--" if kind is None else "-"
        marker = {"bf16": "s", "int8": "^", "ay=2": "s", "ay=4": "^"}.get(name[-4:], "o")
        axes.plot(range(len(records)), values, style, marker=marker, color=_COLOURS[kind or OURS], label=name)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(records)), [link_of(record) for record in records])
    axes.set_ylabel("over one process")
    what = "limited bandwidth" if records[0]["row"] == "f-rate" else "added latency, each way"
    axes.set_title(f"{records[0]['title']} over a slow link: {what}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


__all__ = ["best", "draw", "kind_of"]
