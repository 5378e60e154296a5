"""Runs of a comparison: which there are, which a file of records has already, and running the others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.workers import run_workers

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All that tells one training from another.

    Attributes:
        task: Its name.
        split: The name of one of the task's splits.
        method: The name of a method.
        seed: Of weights and data order.
        learning_rate: The model's.
        budget: Steps, as a multiple of the task's own number.
        devices: Processes.
        points: How many points the curve is to have.
        wire: How activations and targets travel between processes.
    """

    task: str
    split: str
    method: str
    seed: int
    learning_rate: float
    budget: float = 1.0
    devices: int = 1
    points: int = 8
    wire: str = "full"


def run_of(record: Record) -> Run:
    """The run that a record is of."""
    earlier = {"wire": "full"}  # records from before there was a choice
    return Run(**{field.name: {**earlier, **record}[field.name] for field in fields(Run)})


def read(path: Path) -> list[Record]:
    """Reads a file of records, one JSON object a line.

    Raises:
        ValueError: If a line is no record; the message says which.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records.append(record := json.loads(line))
            run_of(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Line {number} of {path} is not the record of a run ({error!r}). If writing it was interrupted, "
                "delete the line: its run will be repeated."
            ) from error
    return records


def lines_of(path: Path) -> list[Record]:
    """The records of a file of some other kind of runs, one JSON object a line, if it exists."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(record: Record, path: Path) -> None:
    """Adds a record to a file, one JSON object a line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def execute(runs: Iterable[Run], path: Path, arguments: list[str], jobs: int = 1) -> None:
    """Runs what is not yet in the file, each in a process of its own, and appends a record as soon as there is one.

    Args:
        runs: In the order in which they begin.
        path: The file of records.
        arguments: For :mod:`benchmarks.training`: where the data are.
        jobs: How many at a time.

    Raises:
        SystemExit: At the end, if runs failed; their messages have been printed.
    """
    done = {run_of(record) for record in read(path)}
    pending = [run for run in dict.fromkeys(runs) if run not in done]
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_one, run, arguments): run for run in pending}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                run = waiting[future]
                name = f"[{number}/{len(pending)}] {run.task}, {run.split}, {run.method}, seed {run.seed}"
                try:
                    record = future.result()
                except RuntimeError as error:
                    failed += 1
                    print(f"{name}: failed. {error}", flush=True)
                    continue
                append(record, path)
                outcome = "diverged" if record["diverged"] else record["metrics"]
                print(f"{name}, rate {run.learning_rate:g}: {outcome}, {record['seconds']:.0f} s", flush=True)
        finally:
            for future in waiting:
                future.cancel()  # after an interrupt, begin nothing new
    if failed:
        raise SystemExit(f"{failed} of {len(pending)} runs failed, see above. The same command repeats only those.")


def _one(run: Run, arguments: list[str]) -> Record:
    (record,) = run_workers("benchmarks.training", ["--run", json.dumps(asdict(run)), *arguments])
    return record


def add_records(parser: argparse.ArgumentParser, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Adds the options about the records: of which seeds, in which file, and whether any are still to be made."""
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--out", type=Path, required=True, help="the file of records, one JSON object a line")
    parser.add_argument("--table", action="store_true", help="train nothing: print what the file has")


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the data are."""
    parser.add_argument("--mnist", type=Path, help="the folder with the four IDX files")
    parser.add_argument("--shakespeare", type=Path, help="the folder with tinyshakespeare's input.txt")


def folder_arguments(options: argparse.Namespace, needed: Iterable[str | None]) -> list[str]:
    """The options of :func:`add_folders` as they were given.

    Args:
        options: As parsed.
        needed: Which data the chosen tasks need.

    Raises:
        SystemExit: If a folder is needed but not given.
    """
    missing = sorted(f"--{name}" for name in set(needed) if name and getattr(options, name) is None)
    if missing:
        raise SystemExit(f"The chosen tasks need {' and '.join(missing)}: the folder with the data, see --help.")
    given = [name for name in ("mnist", "shakespeare") if getattr(options, name)]
    return [part for name in given for part in (f"--{name}", str(getattr(options, name)))]
