"""What it costs when stages wait for nothing: neither for gradients nor for activations, and update at random times.

    python -m benchmarks.unlocked --mnist FOLDER --seeds 0 1 2 --out unlocked.jsonl
    python -m benchmarks.unlocked --table --out unlocked.jsonl

MNIST, an MLP of four hidden layers of 256 with BatchNorm and ReLU, a boundary after each of them; as
:mod:`benchmarks.accuracy` in all else: each training is a process of its own with one thread, seeds share initial
weights, and the last 5000 training images are held out. A stage that is updated with probability p is given 1 / p
times the steps, so that all methods have about equal numbers of updates of each stage. The record of each run is
appended to the file as soon as it ends, and what the file has is not trained again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable

from benchmarks.accuracy import spread
from benchmarks.runs import Record, Run, add_folders, add_records, execute, folder_arguments, read
from benchmarks.tasks import ALL_METHODS, BACKPROPAGATION, TASKS, UNLOCKED, WHOLE
from lightning_sg import PredictorTraining

TASK, SPLIT = "mnist-mlp-4", "every"
COMPARED = [BACKPROPAGATION, "synthetic gradients", *UNLOCKED]

#: By the probability of an update, how many times the task's own number of steps there are.
STEPS = {1.0: 1.0, 0.2: 5.0, 0.05: 20.0}

#: How many percentage points a method may err more than backpropagation.
BAR = 1.0


def probability(method: str) -> float:
    """With which probability a stage is updated at a step."""
    chosen = ALL_METHODS[method]
    if chosen is None:
        return 1.0
    training: PredictorTraining = chosen.callback_arguments.get("training", PredictorTraining())
    return training.update_probability


def plan(methods: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """The runs, seed by seed."""
    methods = list(methods)
    return [
        Run(
            TASK,
            WHOLE if method == BACKPROPAGATION else SPLIT,
            method,
            seed,
            TASKS[TASK].learning_rate,
            budget=STEPS[probability(method)],
        )
        for seed in seeds
        for method in methods
    ]


def table(records: Iterable[Record]) -> str:
    """The comparison as Markdown: mean ± deviation over the seeds, differences by seed.

    Args:
        records: Of any runs; those with another number of steps are left out.
    """
    by_method: dict[str, dict[int, Record]] = {method: {} for method in COMPARED}
    for record in records:
        method = record["method"]
        if method in by_method and record["task"] == TASK and record["budget"] == STEPS[probability(method)]:
            by_method[method][record["seed"]] = record
    base = by_method[BACKPROPAGATION]
    rows = [
        "| | steps | updates of a stage | validation error, % | test error, % | behind backpropagation | bar | met "
        "| seeds | ms a step, of the fastest |",
        "|---" * 10 + "|",
    ]
    for method, found in by_method.items():
        if found:
            rows.append(_row(method, found, base))
    return "\n".join(rows)


def _row(method: str, found: dict[int, Record], base: dict[int, Record]) -> str:
    trained = {seed: record for seed, record in found.items() if not record["diverged"]}
    behind = [
        trained[seed]["metrics"]["test_error"] - base[seed]["metrics"]["test_error"]
        for seed in trained
        if seed in base and not base[seed]["diverged"]
    ]
    judged = method != BACKPROPAGATION
    met = len(trained) == len(found) and bool(behind) and statistics.mean(behind) <= BAR
    steps = next(iter(found.values()))["steps"]
    columns = [
        method,
        f"{steps:,}",
        f"{steps * probability(method):,.0f}",
        *(
            spread([record["metrics"][key] for record in trained.values()], lambda value: f"{value:.2f}")
            for key in ("val_error", "test_error")
        ),
        spread(behind, lambda value: f"{value:+.2f}") if judged else "-",
        f"{BAR:+g}" if judged else "-",
        ("yes" if met else "no") if judged else "-",
        f"{len(found)}" + (f", {len(found) - len(trained)} diverged" if len(trained) < len(found) else ""),
        f"{min(1000 * record['seconds'] / record['steps'] for record in found.values()):.0f}",
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=COMPARED, metavar="METHOD")
    add_records(parser)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    options = parser.parse_args()
    if not options.table:
        execute(plan(options.methods, options.seeds), options.out, folder_arguments(options, ["mnist"]), options.jobs)
    print("\n" + table(read(options.out)))


if __name__ == "__main__":
    main()
