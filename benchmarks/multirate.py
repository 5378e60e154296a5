"""Two networks at different rates: back-propagated together, joined by synthetic gradients, and by no gradient.

    python -m benchmarks.multirate --mnist FOLDER --seeds 0 1 2 --out multirate.jsonl
    python -m benchmarks.multirate --table --out multirate.jsonl

The task and the networks are those of :mod:`examples.multirate`, T = 4. All methods see the same digits, from the same
initial weights; the last 5000 training images are held out, and both networks are judged on sequences of these. The
record of each run is appended to the file as soon as it ends, and what the file has is not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.accuracy import spread
from benchmarks.quiet import QUIET
from benchmarks.runs import Record, add_records, append, lines_of
from examples.mnist import Mnist
from examples.multirate import DigitSequences, TwoRates
from lightning_sg import (
    LocalLoss,
    LossModelPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    ThroughTime,
    ZeroPredictor,
)

TICKS, WINDOWS, STREAMS = 4, 2, 32

#: Digits of a stream between two looks at the held-out accuracy.
LOOK = 640

#: What share of the coupled networks' final accuracy is to be reached.
SHARE = 0.9

COUPLED, NONE = "coupled", "no gradient"
LABELS, LOSS_MODEL = "synthetic gradients, told labels", "synthetic gradients, told labels, loss model"
LOCAL = "a local loss at the messages, told labels"

OF_STATES = {name: MLPPredictor(64, conditional=False) for name in ("fast_memory", "slow_memory")}

#: The callback of each method; coupled networks need none.
CALLBACKS: dict[str, dict[str, Any] | None] = {
    COUPLED: None,
    "synthetic gradients": {"predictor": MLPPredictor(64, conditional=False)},
    "synthetic gradients, bound 3, no guard": {
        "predictor": MLPPredictor(64, conditional=False),
        "training": PredictorTraining(bound=3.0),
        "guard": None,
    },
    LABELS: {"predictor": MLPPredictor(64)},
    LOSS_MODEL: {"predictor": {"messages": LossModelPredictor(objective="both"), **OF_STATES}},
    LOCAL: {"predictor": {"messages": LocalLoss(), **OF_STATES}},
    NONE: {"predictor": ZeroPredictor()},
}
METHODS = list(CALLBACKS)
ANSWERS = ["odd", "threes"]


class Curve(pl.Callback):
    """Looks at the held-out accuracy every so many digits.

    Args:
        held_out: Batches of sequences.
        digits: In a training step.
    """

    def __init__(self, held_out: list[Any], digits: int) -> None:
        self.held_out = held_out
        self.digits = digits
        self.points: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_arguments: Any) -> None:
        """Judges the networks as they are."""
        seen = trainer.global_step * self.digits
        if seen % LOOK:
            return
        assert isinstance(pl_module, TwoRates)
        pl_module.eval()
        with torch.no_grad():
            shares = [pl_module.right(batch) for batch in self.held_out]
        pl_module.train()
        means = {name: float(torch.stack([share[name] for share in shares]).mean()) for name in ANSWERS}
        self.points.append({"digits": seen, **means})


def train(method: str, seed: int, digits: int, mnist: str) -> Record:
    """One run, with its curve.

    Args:
        method: One of :data:`METHODS`.
        seed: Of weights and of the digits drawn.
        digits: Of each stream, in all.
        mnist: The folder of MNIST's files.
    """
    data = Mnist(mnist)
    data.setup("fit")
    length = WINDOWS * TICKS**2
    held_out = list(DigitSequences(data.val_set, TICKS, WINDOWS, 200, 3, seed=99))
    sequences = DigitSequences(data.train_set, TICKS, WINDOWS, STREAMS, digits // length, seed)
    torch.manual_seed(seed)
    module = TwoRates(TICKS, coupled=method == COUPLED, labels=method in (LABELS, LOSS_MODEL, LOCAL))
    curve = Curve(held_out, TICKS**2 if method == COUPLED else TICKS)
    callbacks: list[pl.Callback] = [curve]
    arguments = CALLBACKS[method]
    if arguments is not None:
        training = replace(arguments.get("training", PredictorTraining()), seed=seed)
        options = {**arguments, "training": training}
        callbacks.insert(0, SyntheticGradients(through_time=ThroughTime(scale=1.0), **options))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        **QUIET,
    )
    start = time.perf_counter()
    trainer.fit(module, module.chunks(sequences))
    seconds = time.perf_counter() - start
    return {
        "method": method,
        "seed": seed,
        "digits": digits,
        "steps": trainer.global_step,
        "seconds": seconds,
        "curve": curve.points,
    }


def final(record: Record, answer: str) -> float:
    """The accuracy at the end: the mean of the last three looks."""
    return statistics.mean(point[answer] for point in record["curve"][-3:])


def reached(record: Record, answer: str, goal: float) -> float | None:
    """After how many digits the accuracy was first at ``goal``, if ever."""
    return next((point["digits"] for point in record["curve"] if point[answer] >= goal), None)


def table(records: Iterable[Record], digits: int) -> str:
    """The comparison as Markdown: mean ± deviation over the seeds.

    Args:
        records: Of any runs; those with another number of digits are left out.
        digits: Of each stream.
    """
    kept = [record for record in records if record["digits"] == digits]
    coupled = [record for record in kept if record["method"] == COUPLED]
    goals = {name: SHARE * statistics.mean(final(record, name) for record in coupled) for name in ANSWERS}
    rows = [
        "| | updates of A | A: odd digits right, % | B: threes right, % "
        f"| digits until A is at {goals['odd']:.1f} % | until B is at {goals['threes']:.1f} % | seeds | s |",
        "|---" * 8 + "|",
    ]
    for method in METHODS:
        found = [record for record in kept if record["method"] == method]
        if not found:
            continue
        columns = [method, f"{found[0]['steps']:,}"]
        columns += [spread([final(record, name) for record in found], lambda value: f"{value:.1f}") for name in ANSWERS]
        columns += [_times([reached(record, name, goals[name]) for record in found]) for name in ANSWERS]
        columns += [str(len(found)), f"{min(record['seconds'] for record in found):.0f}"]
        rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows)


def _times(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    missed = "" if len(known) == len(values) else f" ({len(values) - len(known)} of {len(values)} never)"
    return (spread(known, lambda value: f"{value:,.0f}") if known else "-") + missed


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", default="data/mnist", help="the folder of MNIST's four files")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add_records(parser)
    parser.add_argument("--digits", type=int, default=9600, help="digits of each stream")
    options = parser.parse_args()
    keys = ("method", "seed", "digits")
    done = {tuple(record[key] for key in keys) for record in lines_of(options.out)}
    for seed in [] if options.table else options.seeds:
        for method in options.methods:
            if (method, seed, options.digits) in done:
                continue
            record = train(method, seed, options.digits, options.mnist)
            append(record, options.out)
            print(f"{method}, seed {seed}: {record['seconds']:.0f} s, {record['curve'][-1]}", flush=True)
    print("\n" + table(lines_of(options.out), options.digits))


if __name__ == "__main__":
    main()
