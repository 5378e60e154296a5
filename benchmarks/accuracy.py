"""How far decoupled training stays behind plain backpropagation, on several tasks, with seeds and spread.

    python -m benchmarks.accuracy --mnist FOLDER --shakespeare FOLDER --seeds 0 1 2 --jobs 2 --out results.jsonl
    python -m benchmarks.accuracy --table --out results.jsonl

Each training is a process of its own with one thread, so that measured seconds can be compared; ``--jobs`` of them run
at a time. The record of each is appended to the file as soon as it ends, and what the file has is not trained again.
Within a task all runs of a seed have the same initial weights, the same batches in the same order and the same number
of steps. MNIST's last 5000 training images are held out: of several ``--learning-rates``, the table shows for each
method the one with the best mean validation metric, for plain backpropagation no less than for the others.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.runs import Record, Run, add_folders, add_records, execute, folder_arguments, read
from benchmarks.tasks import ALL_METHODS, BACKPROPAGATION, METHODS, TASKS, UNCUT, WHOLE, Metric


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, seed by seed, so that an interrupted comparison has all methods."""
    runs = []
    for seed in options.seeds:
        for name in options.tasks:
            task = TASKS[name]
            for rate in options.learning_rates or [task.learning_rate]:
                for method in options.methods:
                    # Plain backpropagation does not see the boundaries: one run serves all splits.
                    splits = [WHOLE] if method in UNCUT else options.splits or task.judged
                    runs += [
                        Run(name, split, method, seed, rate, options.budget) for split in splits if split in task.splits
                    ]
    return runs


def table(records: Iterable[Record]) -> str:
    """The comparison as Markdown, a table for each task and split.

    Args:
        records: Of any runs; those on several processes are left out, for they belong to another benchmark.

    Returns:
        The tables.
    """
    kept = [record for record in records if record["devices"] == 1]
    parts = []
    for name, task in TASKS.items():
        for budget in sorted({record["budget"] for record in kept if record["task"] == name}):
            group = [record for record in kept if record["task"] == name and record["budget"] == budget]
            base = best_rate([record for record in group if record["method"] == BACKPROPAGATION], task.metric)
            cut = [split for split in task.splits if any(record["split"] == split != WHOLE for record in group)]
            for split in cut or [WHOLE]:
                rows = []
                for method in ALL_METHODS:
                    own = WHOLE if method in UNCUT and method != BACKPROPAGATION else split
                    tried = [record for record in group if record["method"] == method and record["split"] == own]
                    if tried:
                        chosen = best_rate(tried, task.metric)
                        bar = None if method in UNCUT else task.splits[split].bar
                        rows.append(_row(method, chosen, base, task.metric, bar))
                if base and split != WHOLE:
                    rows.insert(0, _row(BACKPROPAGATION, base, base, task.metric, None))
                share = "" if budget == 1 else f", {budget:g} × the steps"
                head = (
                    f"| {split} | {task.metric.title} | behind backpropagation | bar | met | rate | seeds | seconds |"
                )
                parts.append("\n".join([f"### {name}{share}\n", head, "|---" * 8 + "|", *rows]))
    return "\n\n".join(parts)


def best_rate(records: Sequence[Record], metric: Metric) -> list[Record]:
    """Of the runs of one method, those at its best learning rate.

    That is the one with the best mean validation metric. A rate that was tried with fewer seeds than another does not
    count, and one at which a run diverged is the worst.

    Args:
        records: Of one task, split and method.
        metric: The task's.
    """
    by_rate: dict[float, list[Record]] = {}
    for record in records:
        by_rate.setdefault(record["learning_rate"], []).append(record)
    most = max((len(group) for group in by_rate.values()), default=0)
    complete = [group for group in by_rate.values() if len(group) == most]

    def cost(group: list[Record]) -> float:
        if any(record["diverged"] for record in group):
            return math.inf
        mean = statistics.mean(record["metrics"][metric.watched] for record in group)
        return mean if metric.better == "lower" else -mean

    return min(complete, key=cost, default=[])


def differences(records: Sequence[Record], base: Sequence[Record], metric: Metric) -> list[float]:
    """How far each run is behind the run of plain backpropagation with the same seed; those without one are left out.

    Args:
        records: Of one method.
        base: Of plain backpropagation.
        metric: The task's.

    Raises:
        ValueError: If runs of one seed did not begin with the same weights or did not see the same batches.
    """
    partners = {record["seed"]: record for record in base if not record["diverged"]}
    found = []
    for record in records:
        partner = partners.get(record["seed"])
        if partner is None or record["diverged"]:
            continue
        method = ALL_METHODS.get(record["method"])
        alike = partner["fingerprint"] == record["fingerprint"] or (method is not None and method.batch > 1)
        if not alike or partner["steps"] != record["steps"]:
            raise ValueError(
                f"{record['task']}, seed {record['seed']}: '{record['method']}' and plain backpropagation differ in "
                "initial weights, batches or steps, and cannot be compared. Were they run with different versions of "
                "the tasks? Then use a new file."
            )
        found.append(metric.behind(record["metrics"][metric.key], partner["metrics"][metric.key]))
    return found


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean ± sample standard deviation; the latter only where there are several values."""
    if not values:
        return "-"
    deviation = f" ± {show(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else ""
    return show(statistics.mean(values)) + deviation


def _row(method: str, records: Sequence[Record], base: Sequence[Record], metric: Metric, bar: float | None) -> str:
    unit = " %" if metric.relative else ""
    decimals = 2 if metric.relative else metric.decimals
    diverged = sum(record["diverged"] for record in records)
    values = [record["metrics"][metric.key] for record in records if not record["diverged"]]
    behind = differences(records, base, metric)
    shown = spread(values, lambda value: f"{value:.{metric.decimals}f}")
    if diverged:
        shown = f"{diverged} of {len(records)} diverged" + (f"; {shown}" if values else "")
    if bar is None:
        verdict = "-"
    elif diverged:
        verdict = "no"
    elif not behind:
        verdict = "?"  # nothing to compare with yet
    else:
        verdict = "yes" if statistics.mean(behind) <= bar + 1e-9 else "no"  # a mean of 0.1s may be a little over 0.1
    columns = [
        method,
        shown,
        spread(behind, lambda value: f"{value:+.{decimals}f}{unit}") if method != BACKPROPAGATION else "-",
        "-" if bar is None else f"{bar:+g}{unit}",
        verdict,
        f"{records[0]['learning_rate']:g}",
        str(len(records)),
        f"{statistics.mean(record['seconds'] for record in records):.0f}",
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    """Trains what is missing, and prints the tables."""
    splits = list(dict.fromkeys(split for task in TASKS.values() for split in task.splits if split != WHOLE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=list(ALL_METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--splits", nargs="+", choices=splits, metavar="SPLIT", help="by default those with a bar")
    add_records(parser)
    parser.add_argument("--learning-rates", type=float, nargs="+", help="the model's; by default the task's own one")
    parser.add_argument("--budget", type=float, default=1.0, help="steps, as a multiple of each task's own number")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    options = parser.parse_args()
    if not options.table:
        folders = folder_arguments(options, (TASKS[name].folder for name in options.tasks))
        execute(plan(options), options.out, folders, options.jobs)
    print("\n" + table(read(options.out)))


if __name__ == "__main__":
    main()
