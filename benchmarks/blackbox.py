"""Estimators for what cannot be differentiated, on six tasks, with seeds and spread.

    python -m benchmarks.blackbox --mnist FOLDER --seeds 0 1 2 --out blackbox.jsonl
    python -m benchmarks.blackbox --table --out blackbox.jsonl

The record of each run is appended to the file as soon as it ends, and what the file has is not trained again. What is
given as steps counts evaluations of a batch: a method that tries two values for each sample takes half as many steps in
the simulators and the forest, and as many in the other tasks.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import blackbox_tasks as tasks
from benchmarks.accuracy import spread
from benchmarks.blackbox_bare import LOOPS
from benchmarks.blackbox_tasks import BACKPROPAGATION, ESTIMATORS, FROZEN, MEANS, PLAIN, TWO, UNQUANTISED, Metrics
from benchmarks.runs import Record, add_records, append, lines_of

_LEARNED = [name for name in ESTIMATORS if name not in (PLAIN, TWO, "straight-through", "Gumbel-softmax")]
_PATHWISE = ["straight-through", "Gumbel-softmax"]


@dataclass(frozen=True)
class Plan:
    """What a task is run with.

    Attributes:
        run: Takes a method, a seed and a number of steps; with ``data``, also the folder of MNIST's files.
        methods: The methods, with the numbers of steps that each is given.
        shown: The metrics in the table, with their decimals.
        data: Whether it needs MNIST.
    """

    run: Callable[..., Metrics]
    methods: dict[str, Sequence[int]]
    shown: dict[str, int]
    data: bool = False


PLANS: dict[str, Plan] = {
    "toy": Plan(
        tasks.toy,
        dict.fromkeys([*_LEARNED, PLAIN, *_PATHWISE], (800,)),
        {"probability": 3, "loss": 5, "standard_errors": 2, "variance": 9},
    ),
    "pendulum": Plan(
        tasks.pendulum,
        {BACKPROPAGATION: (240,), "critic": (240, 1200), **dict.fromkeys(_LEARNED[1:], (240,))},
        {"before": 3, "cost": 4, "reached": 1},
    ),
    "steps and sines": Plan(
        tasks.steps_and_sines,
        dict.fromkeys([*LOOPS, *_LEARNED], (1536,)),
        {"cost": 4},
    ),
    "rounding": Plan(
        tasks.rounding,
        {**dict.fromkeys([*_LEARNED, *_PATHWISE, UNQUANTISED], (1000,)), MEANS: (0,)},
        {"error": 5},
    ),
    "vae": Plan(
        tasks.vae,
        dict.fromkeys(["evolution", "critic", "control variate", "score function", TWO, "Gumbel-softmax"], (500,)),
        {"bound": 2},
        data=True,
    ),
    "forest": Plan(tasks.forest, {FROZEN: (0,), **dict.fromkeys(_LEARNED, (800,))}, {"error": 4}),
}


def run(task: str, method: str, seed: int, steps: int, mnist: str | None) -> Record:
    """One training, with one thread.

    Args:
        task: One of :data:`PLANS`.
        method: One of its methods.
        seed: Of weights, batches and exploration.
        steps: How many evaluations of a batch it is given.
        mnist: The folder of MNIST's files.
    """
    plan, begin = PLANS[task], time.monotonic()
    more: dict[str, Any] = {"mnist": mnist} if plan.data else {}
    metrics = plan.run(method, seed, steps, **more)
    seconds = round(time.monotonic() - begin, 1)
    return {"task": task, "method": method, "seed": seed, "steps": steps, "metrics": metrics, "seconds": seconds}


def table(records: Iterable[Record]) -> str:
    """The comparison as Markdown, a table for each task."""
    kept, parts = list(records), []
    for name, plan in PLANS.items():
        of_task = [_with_shares(record, kept) for record in kept if record["task"] == name]
        if not of_task:
            continue
        head = ["method", "steps", *(key.replace("_", " ") for key in plan.shown), "seeds"]
        rows = [f"### {name}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for method, budgets in plan.methods.items():
            for steps in budgets:
                group = [each for each in of_task if (each["method"], each["steps"]) == (method, steps)]
                if group:
                    cells = [_cell(group, key, decimals) for key, decimals in plan.shown.items()]
                    rows.append(f"| {method} | {steps:,} | " + " | ".join(cells) + f" | {len(group)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _with_shares(record: Record, records: Sequence[Record]) -> Record:
    """Adds how much of what backpropagation gains a run of the simulator gains with the same seed, in %."""
    if record["task"] != "pendulum":
        return record
    partners = [
        each
        for each in records
        if (each["task"], each["method"], each["seed"]) == ("pendulum", BACKPROPAGATION, record["seed"])
    ]
    if not partners:
        return record
    best, own = partners[0]["metrics"], record["metrics"]
    reached = 100 * (own["before"] - own["cost"]) / (best["before"] - best["cost"])
    return {**record, "metrics": {**own, "reached": reached}}


def _cell(group: Sequence[Record], key: str, decimals: int) -> str:
    values = [record["metrics"][key] for record in group if key in record["metrics"]]
    if key == "variance" and values:
        return f"{statistics.mean(values):.2g}"
    if key == "standard_errors" and any(abs(value) > 1000 for value in values):
        return "biased"
    return spread(values, lambda value: f"{value:.{decimals}f}")


def main() -> None:
    """Trains what the file does not have, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_records(parser)
    parser.add_argument("--tasks", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--mnist", help="the folder with the four IDX files, for the autoencoder")
    options = parser.parse_args()
    if options.table:
        print(table(lines_of(options.out)))
        return
    if options.mnist is None and "vae" in options.tasks:
        parser.error("vae needs --mnist FOLDER; or choose other --tasks")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    done = {(each["task"], each["method"], each["seed"], each["steps"]) for each in lines_of(options.out)}
    for seed in options.seeds:
        for task in options.tasks:
            for method, budgets in PLANS[task].methods.items():
                for steps in budgets:
                    if (task, method, seed, steps) in done:
                        continue
                    record = run(task, method, seed, steps, options.mnist)
                    append(record, options.out)
                    print(f"{task}, {method}, seed {seed}, {steps} steps: {record['metrics']}", flush=True)


if __name__ == "__main__":
    main()
