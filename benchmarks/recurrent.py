"""How far a recurrent network sees that is trained in chunks, without and with synthetic gradients at their ends.

    python -m benchmarks.recurrent --tasks copy --out recurrent.jsonl
    python -m benchmarks.recurrent --tasks text --shakespeare FOLDER --out recurrent.jsonl
    python -m benchmarks.recurrent --table --out recurrent.jsonl

``copy`` and ``repeat copy``: the longest sequence solved (below 0.15 bits of error a bit) after so many updates, by the
number of time steps in a chunk; a curriculum adds a bit when a length is solved (Jaderberg et al. 2017, table 2).
``text``: bits for each character of tiny Shakespeare held out; all see the same number of characters in each update,
and the same number of updates. Each training is a process of its own with one thread; its record is appended to the
file when it ends, and what the file has is not trained again.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.quiet import QUIET
from benchmarks.runs import Record, add_records, append, lines_of
from examples.copying import Copier
from examples.shakespeare_lstm import CharLSTM, ShakespeareStreams
from lightning_sg import LinearPredictor, PredictorTraining, SyntheticGradients, ThroughTime

TRUNCATED, SYNTHETIC, AUXILIARY, WEAK, UNBIASED = (
    "truncated",
    "synthetic gradients",
    "and auxiliary task",
    "synthetic gradients, a tenth of them",
    "BP(1) over six chunks",
)
METHODS: dict[str, ThroughTime | None] = {
    TRUNCATED: None,
    SYNTHETIC: ThroughTime(scale=1.0),
    AUXILIARY: ThroughTime(scale=1.0, auxiliary=0.1),
    WEAK: ThroughTime(scale=0.1),
    UNBIASED: ThroughTime(scale=1.0, trace_decay=1.0, chunks=6),
}

#: Time steps in a chunk, by task and method.
CHUNKS = {
    "copy": {**dict.fromkeys((TRUNCATED, SYNTHETIC, AUXILIARY, WEAK), (2, 3, 4, 5)), UNBIASED: (3,)},
    "repeat copy": dict.fromkeys((TRUNCATED, SYNTHETIC, AUXILIARY), (2, 3, 4, 5)),
    "text": {TRUNCATED: (8, 20, 40), SYNTHETIC: (8,), WEAK: (8,)},
}
UPDATES = {"copy": 20_000, "repeat copy": 20_000, "text": 3_900}
CHARACTERS_IN_AN_UPDATE = 1280

#: Steps of a predictor in each of the network's.
PREDICTOR_UPDATES = 3


@dataclass(frozen=True)
class Run:
    """All that tells one training from another."""

    task: str
    method: str
    chunk: int
    seed: int
    updates: int


class Curve(pl.Callback):
    """The longest sequence solved at each tenth of the training."""

    def __init__(self, updates: int) -> None:
        self.every = max(1, updates // 10)
        self.solved: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_others: Any) -> None:
        """Notes it."""
        if trainer.global_step % self.every == 0:
            self.solved.append(module.curriculum.solved)


def train(run: Run, shakespeare: str | None) -> Record:
    """One training."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(run.seed, verbose=False)
    settings = METHODS[run.method]
    callbacks: list[pl.Callback] = []
    if settings is not None:
        callbacks.append(
            SyntheticGradients(
                predictor=LinearPredictor(conditional=False, normalize="none"),
                training=PredictorTraining(
                    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3, fused=True),
                    updates=PREDICTOR_UPDATES,
                ),
                through_time=settings,
                guard=None,
            )
        )
    arguments: dict[str, Any] = {"accelerator": "cpu", "max_steps": run.updates, "max_epochs": -1, **QUIET}
    start = time.perf_counter()
    if run.task == "text":
        assert shakespeare is not None
        data = ShakespeareStreams(shakespeare, run.chunk, CHARACTERS_IN_AN_UPDATE // run.chunk)
        trainer = pl.Trainer(**arguments, callbacks=callbacks, limit_val_batches=0)
        text = CharLSTM()
        trainer.fit(text, data)
        seconds = time.perf_counter() - start
        judge = pl.Trainer(**arguments)
        result = {"bits": judge.validate(text, data, verbose=False)[0]["val_bits"]}
    else:
        copier = Copier(run.chunk, run.task == "repeat copy", seed=run.seed)
        curve = Curve(run.updates)
        pl.Trainer(**arguments, callbacks=[*callbacks, curve]).fit(copier)
        seconds = time.perf_counter() - start
        result = {"solved": copier.curriculum.solved, "curve": curve.solved}
    return {**asdict(run), **result, "seconds": round(seconds, 1)}


def plan(tasks: Iterable[str], seeds: Iterable[int], chunks: Sequence[int] | None, updates: int | None) -> list[Run]:
    """The runs, seed by seed."""
    return [
        Run(task, method, chunk, seed, updates or UPDATES[task])
        for seed in seeds
        for task in tasks
        for method, lengths in CHUNKS[task].items()
        for chunk in lengths
        if chunks is None or chunk in chunks
    ]


def table(records: Iterable[Record]) -> str:
    """The comparison as Markdown, a table for each task and number of updates.

    By chunk length: the mean over the seeds, and their range where there are several.
    """
    lines = []
    found = list(records)
    for task, updates in sorted({(record["task"], record["updates"]) for record in found}):
        ours = [record for record in found if (record["task"], record["updates"]) == (task, updates)]
        lengths = sorted({record["chunk"] for record in ours})
        key, digits = ("bits", 3) if task == "text" else ("solved", 0)
        lines += [f"{task}, {updates:,} updates", ""]
        lines += ["| | " + " | ".join(f"T = {length}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
        for method in METHODS:
            cells = []
            for length in lengths:
                values = [r[key] for r in ours if r["method"] == method and r["chunk"] == length]
                cells.append(_cell(values, digits))
            if any(cell != "-" for cell in cells):
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean = statistics.mean(values)
    return f"{mean:.{max(digits, 1)}f} ({min(values):.{digits}f}-{max(values):.{digits}f}, {len(values)} seeds)"


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=CHUNKS, default=["copy", "repeat copy"], metavar="TASK")
    parser.add_argument("--chunks", type=int, nargs="+", help="only these lengths of chunks")
    add_records(parser, seeds=[0])
    parser.add_argument("--updates", type=int, help="in place of the tasks' own numbers")
    parser.add_argument("--shakespeare", help="the folder with input.txt, for the text")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    options = parser.parse_args()
    if not options.table:
        if "text" in options.tasks and options.shakespeare is None:
            parser.error("the text needs --shakespeare")
        names = Run.__dataclass_fields__
        done = {Run(**{name: record[name] for name in names}) for record in lines_of(options.out)}
        missing = [r for r in plan(options.tasks, options.seeds, options.chunks, options.updates) if r not in done]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
            for future in as_completed([pool.submit(train, run, options.shakespeare) for run in missing]):
                record = future.result()
                append(record, options.out)
                print(record, flush=True)
    print("\n" + table(lines_of(options.out)))


if __name__ == "__main__":
    main()
