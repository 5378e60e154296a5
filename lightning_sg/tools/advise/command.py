"""``lightning-sg advise``: says whether the split of a configuration is worth it on this machine."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_sg.arguments import checked, whole
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.tools.advise.measure import SKIPPED, Measured, measure
from lightning_sg.tools.text import aligned

#: What makes the same configuration plain backpropagation in one process.
PLAIN = ("--sg.boundaries=[]", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1")

#: A stage that waits for more than this share of its time is not the bottleneck.
_WAITS = 0.25
#: A predictor that takes more than this share of a process's time is large.
_PREDICTS = 0.15


def main(args: Sequence[str] | None = None) -> None:
    """Trains a few steps in both ways, and prints a comparison and what to do.

    Args:
        args: The arguments after ``advise``; by default those of the process.

    Raises:
        SystemExit: If a training fails.
    """
    arguments, rest = parser().parse_known_args(args)
    if not any(each in ("-c", "--config") or each.startswith(("--config=", "--model")) for each in rest):
        parser().error("give --config FILE, or --model and --data, as to 'lightning-sg fit'")
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"Training {SKIPPED + arguments.steps} steps by plain backpropagation, in one process ...", flush=True
            )
            plain = measure([*rest, *PLAIN], arguments.steps, Path(folder) / "plain")
            print("The same as the configuration says ...\n", flush=True)
            split = measure(rest, arguments.steps, Path(folder) / "split")
    except SyntheticGradientsError as error:
        raise SystemExit(str(error)) from None
    print("\n".join([*table(plain, split), "", *advice(plain, split)]))


def parser() -> argparse.ArgumentParser:
    """The arguments of ``advise`` itself."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg advise",
        usage="lightning-sg advise [--steps N] --config FILE [OPTIONS]",
        description="Trains a few steps of a configuration twice on this machine, by plain backpropagation in one "
        "process and as the configuration says, and compares time, waiting, alignment and loss. All other options "
        "are those of 'lightning-sg fit'.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=_steps, default=40, help="how many steps are measured (default: 40)")
    return parser


def _steps(value: str) -> int:
    try:
        return checked("advise", "--steps", int(value), whole(4, 100_000))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a whole number from 4 to 100,000, not {value!r}") from error


def table(plain: Measured, split: Measured) -> list[str]:
    """The comparison, as lines of a table."""
    rows = [["", "plain", "as configured"], ["processes", str(plain.processes), str(split.processes)]]
    rows.append(["ms a step", f"{plain.milliseconds:.1f}", f"{split.milliseconds:.1f}"])
    for name in sorted(plain.losses.keys() & split.losses.keys()):
        rows.append([f"{name}, last steps", f"{plain.losses[name]:.4g}", f"{split.losses[name]:.4g}"])
    for name, cosine in split.cosines.items():
        rows.append([f"cosine at {name}", "", f"{cosine:.2f}"])
    for place, shares in enumerate(split.shares):
        rank = len(split.shares) - 1 - place
        for kind in ("wait", "predictor"):
            rows.append([f"{kind}, rank {rank}", "", f"{shares.get(kind, 0.0):.0%}"])
    return aligned(rows, names_first=True)


def advice(plain: Measured, split: Measured) -> list[str]:
    """What follows from the figures, as sentences."""
    if not split.cosines:
        return [
            "Nothing was decoupled: the configuration has no boundary, or no target came back in these steps. Put a "
            "Boundary into the model, name one (--sg.boundaries '[encoder.2]'), or measure more steps."
        ]
    gain = plain.milliseconds / split.milliseconds
    said = [f"Speed: {gain:.2f} times plain backpropagation in one process, on {split.processes}."]
    if any(math.isnan(value) or math.isinf(value) for value in split.losses.values()):
        return [*said, "The loss is not finite. Try a smaller learning rate, or --sg.exact.warm_up 200."]
    if split.processes == 1:
        said.append("In one process decoupling only costs time: this is for trying out. See 'lightning-sg plan'.")
    elif gain < 1.1:
        said.append("The split does not pay here: " + _why_slow(split))
    elif gain < 0.7 * split.processes:
        said.append("There is more to gain: " + _why_slow(split))
    said.append(
        "Loss: so few steps tell whether something breaks, not what the price is in the end. Train plain and decoupled "
        "to the end once, in one process, and compare them with 'lightning-sg report'."
    )
    return said


def _why_slow(split: Measured) -> str:
    """The likeliest reason, from where the processes' time goes."""
    waits = [shares.get("wait", 0.0) for shares in split.shares]
    predicts = max(shares.get("predictor", 0.0) for shares in split.shares)
    busiest = len(waits) - 1 - min(range(len(waits)), key=waits.__getitem__)
    if predicts > _PREDICTS:
        return f"the predictor takes {predicts:.0%} of a process's time. Use a smaller one, or fewer boundaries."
    if max(waits) > _WAITS and max(waits) - min(waits) > _WAITS / 2:
        return f"rank {busiest} is the bottleneck, as it waits least. Move a boundary: give it fewer layers."
    if split.milliseconds < 20:
        return "steps are so short that Lightning's own work and messages weigh. Larger batches or layers pay more."
    return "the processes may share cores or memory. Compare with fewer threads each (OMP_NUM_THREADS)."


__all__ = ["PLAIN", "advice", "main", "parser", "table"]
