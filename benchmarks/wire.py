"""What rounding on the wire costs in accuracy: two decoupled stages on two processes, each way to send.

    python -m benchmarks.wire --mnist FOLDER --shakespeare FOLDER --seeds 0 1 2 --out wire.jsonl
    python -m benchmarks.wire --table --out wire.jsonl

Runs of a seed have the same initial weights and batches. Validation sends in full, so what is compared is the training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from benchmarks.accuracy import spread
from benchmarks.runs import Record, Run, add_folders, add_records, execute, folder_arguments, read
from benchmarks.tasks import TASKS
from lightning_sg.transport import COMPRESSIONS

METHOD = "synthetic gradients"


def plan(tasks: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Every way to send, side by side for each seed."""
    return [
        Run(name, TASKS[name].halves, METHOD, seed, TASKS[name].learning_rate, devices=2, points=4, wire=wire)
        for name in tasks
        for seed in seeds
        for wire in COMPRESSIONS
    ]


def table(records: Iterable[Record]) -> str:
    """The comparison as Markdown."""
    records = list(records)
    rows = ["| task | wire | metric | worse than full | seeds |", "|---" * 5 + "|"]
    for name in dict.fromkeys(record["task"] for record in records):
        metric = TASKS[name].metric
        found = {
            wire: {r["seed"]: r["metrics"][metric.key] for r in records if (r["task"], r["wire"]) == (name, wire)}
            for wire in COMPRESSIONS
        }
        for wire, values in found.items():
            behind = [
                metric.behind(value, found["full"][seed]) for seed, value in values.items() if seed in found["full"]
            ]
            shown = spread(list(values.values()), lambda value: f"{value:.{metric.decimals}f}")  # noqa: B023 (used here)
            unit, decimals = (" %", 2) if metric.relative else ("", metric.decimals)
            worse = "-" if wire == "full" else spread(behind, lambda value: f"{value:+.{decimals}f}{unit}")  # noqa: B023
            rows.append(f"| {name}, {metric.title} | {wire} | {shown} | {worse} | {len(values)} |")
    return "\n".join(rows)


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["hard-mlp-6", "char-800"], metavar="TASK")
    add_records(parser)
    options = parser.parse_args()
    if not options.table:
        folders = folder_arguments(options, (TASKS[name].folder for name in options.tasks))
        execute(plan(options.tasks, options.seeds), options.out, folders)
    print("\n" + table(read(options.out)))


if __name__ == "__main__":
    main()
