"""What follows from a plain and some split trainings: a table, the best cut, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_sg.tools.advise.measure import Measured
from lightning_sg.tools.plan.estimate import Overhead
from lightning_sg.tools.text import aligned

#: A stage that waits for more than this share of its time is not the bottleneck.
_WAITS = 0.25
#: A predictor that takes more than this share of a process's time is large.
_PREDICTS = 0.15
#: A split step should not take more than this share of a plain step besides computing.
_OVERHEAD = 0.4


@dataclass(frozen=True)
class Trial:
    """One way to split the model, and what it showed.

    Attributes:
        label: What it is called in the table.
        names: The boundaries; ``None`` for those of the configuration or of the model.
        measured: What it showed.
    """

    label: str
    names: list[str] | None
    measured: Measured


@dataclass(frozen=True)
class Advice:
    """Whether a split is worth it on this machine; as text, the table and what follows from it.

    Attributes:
        plain: What plain backpropagation in one process showed.
        trials: What each split showed.
    """

    plain: Measured
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The fastest split, of those whose losses are finite if there are any."""
        finite = [trial for trial in self.trials if all(map(math.isfinite, trial.measured.losses.values()))]
        return min(finite or self.trials, key=lambda trial: trial.measured.milliseconds)

    @property
    def speedup(self) -> float:
        """How many times as fast as plain backpropagation the steps of the best split are."""
        return self.plain.milliseconds / self.best.measured.milliseconds

    @property
    def price(self) -> dict[str, float]:
        """What the best split has more of what the model logs than plain training, after equally many steps."""
        split = self.best.measured.losses
        return {name: split[name] - self.plain.losses[name] for name in sorted(split.keys() & self.plain.losses.keys())}

    @property
    def overhead(self) -> Overhead:
        """What a step costs besides computing, for ``plan``."""
        computing = max(self.plain.milliseconds - self.plain.overhead, 1e-6)
        return Overhead(self.plain.overhead / computing, self.best.measured.overhead / computing)

    def __str__(self) -> str:
        """The table and what follows from it."""
        return "\n".join([*table(self), "", *sentences(self)])


def table(advice: Advice) -> list[str]:
    """The comparison, as lines of a table with a column for each training."""
    columns = [advice.plain, *(trial.measured for trial in advice.trials)]
    rows = [["", "plain", *(trial.label for trial in advice.trials)]]

    def row(heading: str, cells: Sequence[str]) -> None:
        if any(cells):
            rows.append([heading, *cells])

    row("processes", [str(each.processes) for each in columns])
    row("ms a step", [f"{each.milliseconds:.1f}" for each in columns])
    row("peak memory, MiB", [f"{max(each.memory):,.0f}" if each.memory else "" for each in columns])
    for name in sorted(advice.plain.losses):
        row(f"{name}, last steps", [f"{each.losses[name]:.4g}" if name in each.losses else "" for each in columns])
    for name in dict.fromkeys(name for each in columns for name in each.cosines):
        row(f"cosine at {name}", [f"{each.cosines[name]:.2f}" if name in each.cosines else "" for each in columns])
    for place in range(max(each.processes for each in columns[1:])):
        for kind in ("wait", "predictor"):
            row(f"{kind}, rank {place}", ["", *(_share(each, place, kind) for each in columns[1:])])
    return aligned(rows, names_first=True)


def _share(measured: Measured, rank: int, kind: str) -> str:
    """A share of the time of the process of a rank: the last stage is on rank 0."""
    place = measured.processes - 1 - rank
    return f"{measured.shares[place].get(kind, 0.0):.0%}" if place >= 0 else ""


def sentences(advice: Advice) -> list[str]:
    """What follows from the figures."""
    best = advice.best
    split = best.measured
    if not any(trial.measured.cosines for trial in advice.trials):
        return [
            "Nothing was decoupled: the configuration has no boundary, or no target came back in these steps. Put a "
            "Boundary into the model, name one (boundaries=['encoder.2'], or --sg.boundaries '[encoder.2]'), or "
            "measure more steps."
        ]
    gain = advice.speedup
    which = f" The best cut is {best.label}." if len(advice.trials) > 1 else ""
    said = [f"Speed: {gain:.2f} times plain backpropagation in one process, on {split.processes}.{which}"]
    if not all(map(math.isfinite, split.losses.values())):
        return [*said, "The loss is not finite. Try a smaller learning rate, or ExactGradients(warm_up=200)."]
    if split.processes == 1:
        said.append("In one process decoupling only costs time: this is for trying out. See 'lightning-sg plan'.")
    elif gain < 1.1:
        said.append("The split does not pay here: " + _why_slow(advice))
    elif gain < 0.7 * split.processes:
        said.append("There is more to gain: " + _why_slow(advice))
    if advice.price:
        paid = ", ".join(f"{name} {difference:+.3g}" for name, difference in advice.price.items())
        said.append(f"Price so far, after equally many steps: {paid}.")
    said.append(
        "So few steps tell whether something breaks, not what the price is in the end. Train plain and decoupled to "
        "the end once, in one process, and compare them with 'lightning-sg report'."
    )
    if split.processes > 1:
        overhead = advice.overhead
        said.append(f"To plan other cuts with what a step costs here: --overhead {overhead}.")
    return said


def _why_slow(advice: Advice) -> str:
    """The likeliest reason, from where the processes' time goes."""
    split = advice.best.measured
    if split.overhead > _OVERHEAD * advice.plain.milliseconds:
        return (
            f"a step takes {split.overhead:.1f} ms besides computing, for messages, data and Lightning's own work, and "
            f"{advice.plain.milliseconds:.1f} ms in all without a split. Larger batches or layers pay more."
        )
    waits = [shares.get("wait", 0.0) for shares in split.shares]
    predicts = max(shares.get("predictor", 0.0) for shares in split.shares)
    busiest = len(waits) - 1 - min(range(len(waits)), key=waits.__getitem__)
    if predicts > _PREDICTS:
        return f"the predictor takes {predicts:.0%} of a process's time. Use a smaller one, or fewer boundaries."
    if max(waits) > _WAITS and max(waits) - min(waits) > _WAITS / 2:
        return f"rank {busiest} is the bottleneck, as it waits least. Move a boundary: give it fewer layers."
    return "the processes may share cores or memory. Compare with fewer threads each (OMP_NUM_THREADS)."


__all__ = ["Advice", "Trial", "sentences", "table"]
