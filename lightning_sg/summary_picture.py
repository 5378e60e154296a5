"""A picture of a run for Weights & Biases when it ends: alignment, the time of a step, and where the time went."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sg.lightning_api import pl, rank_zero_warn
from lightning_sg.run_summary import Times, is_wandb, label_of
from lightning_sg.step_clock import Shares

#: Where the picture is in a run of Weights & Biases.
KEY = "sg/summary"
#: The most points that are kept of a run.
_MOST = 2000
#: The colours of Okabe and Ito, which people with any colour vision can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_SHARES = ("#0072b2", "#e69f00", "#d55e00", "#c8c8c8")


class SummaryPicture:
    """Keeps what was logged about the boundaries of a run, and draws it once for Weights & Biases."""

    def __init__(self) -> None:
        self._cosines: list[tuple[int, Mapping[str, Tensor]]] = []
        self._milliseconds: list[tuple[int, float]] = []

    def begin(self) -> None:
        """Training begins."""
        self._cosines, self._milliseconds = [], []

    def add(self, trainer: pl.Trainer, cosines: Mapping[str, Tensor], times: Mapping[str, float]) -> None:
        """Takes what is logged at a step, if it will be drawn."""
        if not any(map(is_wandb, trainer.loggers)):
            return
        if cosines:
            self._cosines = _thinned([*self._cosines, (trainer.global_step, cosines)])
        if "sg/step_ms" in times:
            self._milliseconds = _thinned([*self._milliseconds, (trainer.global_step, times["sg/step_ms"])])

    def log(self, trainer: pl.Trainer, times: Times) -> None:
        """Draws it and gives it to Weights & Biases. Without matplotlib there is none."""
        loggers: list[Any] = [each for each in trainer.loggers if is_wandb(each)]
        if not (loggers and trainer.is_global_zero and self._cosines):
            return
        if importlib.util.find_spec("matplotlib") is None:
            return
        try:
            from matplotlib import rc_context

            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "summary.png"
                with rc_context({"text.parse_math": False}):  # a name with "$" is no formula
                    self._draw(path, times)
                for logger in loggers:
                    logger.log_image(KEY, [str(path)])
        except Exception as error:  # the end of a long training is no place to fail for a picture
            rank_zero_warn(f"The summary picture for Weights & Biases could not be made: {error}")

    def _draw(self, path: Path, times: Times) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        alignment, pace, work = figure.subplots(1, 3)
        names = list(dict.fromkeys(name for _, cosines in self._cosines for name in cosines))
        for place, name in enumerate(names):
            points = [(step, float(cosines[name])) for step, cosines in self._cosines if name in cosines]
            # A label that begins with "_" would be left out; a hair space in front prevents that.
            colour, label = _COLOURS[place % len(_COLOURS)], f"\u200a{name}"
            alignment.plot(*zip(*points), color=colour, label=label, linewidth=1, marker=".", markersize=3)
        alignment.axhline(0, color="#444444", linewidth=0.8)
        alignment.set(title="Cosine of prediction and target", xlabel="training step", ylim=(None, 1.02))
        alignment.legend(fontsize=7, frameon=False, ncols=1 + len(names) // 9)
        if self._milliseconds:
            pace.plot(*zip(*self._milliseconds), color=_COLOURS[0], linewidth=1, marker=".", markersize=3)
            pace.set_ylim(0, None)
        pace.set(title="Milliseconds a step", xlabel="training step")
        rows = [name for name in (*names, "") if name in times.shares]
        left = [0.0] * len(rows)
        for kind, colour in zip(fields(Shares), _SHARES):
            widths = [100 * getattr(times.shares[name], kind.name) for name in rows]
            work.barh(range(len(rows)), widths, left=left, color=colour, label=kind.name, height=0.6)
            left = [before + width for before, width in zip(left, widths)]
        work.set_yticks(range(len(rows)), labels=[label_of(name, place, len(rows)) for place, name in enumerate(rows)])
        work.invert_yaxis()
        work.set(title="Where the time went", xlabel="% of the time of a process", xlim=(0, 100))
        work.legend(fontsize=7, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        figure.savefig(path, dpi=110)


def _thinned(points: list[Any]) -> list[Any]:
    """Every second point, once there are many: the newest is kept."""
    return points[::-1][::2][::-1] if len(points) > _MOST else points


__all__ = ["KEY", "SummaryPicture"]
