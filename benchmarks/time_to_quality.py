"""Time until two decoupled stages on two processes are as good as plain backpropagation on one is at its end.

    python -m benchmarks.time_to_quality --shakespeare FOLDER --tasks char-800 --seeds 0 1 2 --out times.jsonl

The package chooses where to cut, so that both processes have about the same to do. Each process has one thread. Runs
take turns, never two at a time, plain and decoupled of one seed side by side. The validation metric is noted at regular
steps, and the clock stands still while validating, for all ways to train; what remains is the training, data loading
and the exchange between the processes included. The quality to be reached is what plain backpropagation with the same
seed has after its last step; the time to it, for plain and decoupled alike, that of the first point of the curve which
is as good. The record of each run is appended to the file as soon as it ends, and what the file has is not trained
again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.accuracy import spread
from benchmarks.runs import Record, Run, add_folders, add_records, execute, folder_arguments, read
from benchmarks.tasks import AUTO, BACKPROPAGATION, METHODS, TASKS, WHOLE, Metric

DEVICES = 2
HALVES = "halves"


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for; plain backpropagation comes first for each seed."""
    runs = []
    for name in options.tasks:
        task = TASKS[name]
        for seed in options.seeds:
            common = {"seed": seed, "learning_rate": task.learning_rate, "points": options.points}
            runs.append(Run(name, WHOLE, BACKPROPAGATION, **common))
            runs += [
                Run(name, _split(name, options.split), method, budget=options.budget, devices=DEVICES, **common)
                for method in options.methods
            ]
    return runs


def _split(task: str, chosen: str) -> str:
    return TASKS[task].halves if chosen == HALVES else chosen


def time_to(record: Record, quality: float, metric: Metric) -> float | None:
    """Seconds until the curve is first as good as ``quality``, or ``None`` if it never is."""
    for _step, seconds, value in record["curve"]:
        if value is not None and metric.behind(value, quality) <= 0:
            return float(seconds)
    return None


def table(records: Iterable[Record]) -> str:
    """The comparison as Markdown, a table for each task.

    Args:
        records: Of any runs; those that belong to another benchmark are left out.
    """
    records = list(records)
    parts = []
    for name, task in TASKS.items():
        group = [record for record in records if record["task"] == name]
        ways = sorted(
            {(record["split"], record["points"], record["budget"]) for record in group if record["devices"] == DEVICES}
        )
        for split, points, budget in ways:
            base = {
                record["seed"]: record
                for record in group
                if record["method"] == BACKPROPAGATION and record["points"] == points and not record["diverged"]
                if record["budget"] == 1 and record["learning_rate"] == task.learning_rate
            }
            rows = [_row(f"{BACKPROPAGATION}, one process", list(base.values()), base, task.metric)] if base else []
            for method in METHODS:
                chosen = [
                    record
                    for record in group
                    if record["method"] == method and record["devices"] == DEVICES
                    if (record["split"], record["points"], record["budget"]) == (split, points, budget)
                    if record["seed"] in base
                ]
                if chosen:
                    rows.append(_row(f"{method}, two processes", chosen, base, task.metric))
            if not rows:
                continue  # nothing to compare with yet
            share = "" if budget == 1 else f", {budget:g} × the steps"
            head = (
                f"| {split} | {task.metric.title}, validation, at the end | seconds to the baseline's quality | "
                "over backpropagation | ms a step | over backpropagation | reached |"
            )
            parts.append("\n".join([f"### {name}{share}\n", head, "|---" * 7 + "|", *rows]))
    return "\n\n".join(parts)


def _row(title: str, records: Sequence[Record], base: dict[int, Record], metric: Metric) -> str:
    times, ratios, speeds, speed_ratios, ends = [], [], [], [], []
    for record in records:
        partner = base[record["seed"]]
        quality = partner["metrics"][metric.watched]
        reached, needed = time_to(record, quality, metric), time_to(partner, quality, metric)
        if reached is not None and needed:
            times.append(reached)
            ratios.append(reached / needed)
        if not record["diverged"]:
            ends.append(record["metrics"][metric.watched])
            speeds.append(1000 * record["seconds"] / record["steps"])
            speed_ratios.append(speeds[-1] / (1000 * partner["seconds"] / partner["steps"]))
    columns = [
        title,
        spread(ends, lambda value: f"{value:.{metric.decimals}f}"),
        spread(times, lambda value: f"{value:.1f}") if times else "not reached",
        # A mean over the seeds that got there would hide those that did not.
        spread(ratios, lambda value: f"{value:.2f}") if len(ratios) == len(records) else "-",
        spread(speeds, lambda value: f"{value:.1f}"),
        f"{statistics.median(speed_ratios):.2f}" if speed_ratios else "-",
        f"{len(times)} of {len(records)}",
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    """Trains what is missing, and prints the tables."""
    decoupled = [method for method in METHODS if method != BACKPROPAGATION]
    offered = ["synthetic gradients", "delayed gradient"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["hard-mlp-6", "char-800"], metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=decoupled, default=offered, metavar="METHOD")
    add_records(parser)
    parser.add_argument(
        "--budget", type=float, default=1.0, help="steps of decoupled training, as a multiple of backpropagation's"
    )
    parser.add_argument(
        "--split",
        choices=[AUTO, HALVES],
        default=AUTO,
        help='where to cut: as boundaries="auto" chooses, or in the middle of the layers (default: %(default)s)',
    )
    parser.add_argument("--points", type=int, default=20, help="how many points each curve has")
    options = parser.parse_args()
    if not options.table:
        folders = folder_arguments(options, (TASKS[name].folder for name in options.tasks))
        execute(plan(options), options.out, folders)
    print("\n" + table(read(options.out)))


if __name__ == "__main__":
    main()
