"""Throughput of decoupled stages against every other way to use the same processes, all in one run.

    python -m benchmarks.throughput --rows a e --rounds 5 --out throughput.json --figure throughput.png
    python -m benchmarks.throughput --table --out throughput.json

Rows: (a) 2 × 4 Linear(2048), batch 256; (b) a transformer encoder; (c) a CNN; (d) unbalanced stages; (e) 2, 4 and 8
stages that sleep in place of computing, as devices of their own would; (f) the model of (a) over slow links, ``f-rate``
with limited bandwidth and ``f-latency`` with added latency, which needs root. Within a row all contestants take turns
in the same processes, one thread each, with the same model and data, and the order rotates with the rounds; single ones
run in the first process while the others wait. ``--inspect`` also runs each contestant once on its own, for its memory
and for what a step's time goes into. The file of records grows row by row; a row that is in it is replaced.
``--passes`` goes through the conditions several times and puts the rounds together: what drifts with the machine then
falls on all conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.channel import Channel, NoChannelError
from benchmarks.contest import workload_of
from benchmarks.contestants import DELAYED, ONE, OURS, contestants
from benchmarks.throughput_tables import tables
from benchmarks.workers import run_group

RATES = (None, 1000, 200, 50)  # Mbit/s
LATENCIES = (0, 1, 10, 50, 100)  # ms
ROWS = ("a", "b", "c", "d", "e", "f-rate", "f-latency")
_DDP_RATE = 200  # Mbit/s, below which DDP is left out
_WORKLOADS = {"a": ["linears"], "b": ["encoder"], "c": ["cnn"], "d": ["unbalanced"]}

Record = dict[str, Any]


def conditions(row: str, stage_ms: float) -> Iterator[Record]:
    """What a row consists of: workloads, and the network between the processes where it is not the machine's own."""
    if row == "e":
        yield from ({"row": row, "workload": f"emulated-{stages}x{stage_ms:g}"} for stages in (2, 4, 8))
    elif row == "f-rate":
        yield from ({"row": row, "workload": "linears", "megabits": rate, "latency_ms": 0} for rate in RATES)
    elif row == "f-latency":
        yield from ({"row": row, "workload": "linears", "megabits": None, "latency_ms": late} for late in LATENCIES)
    else:
        yield from ({"row": row, "workload": name} for name in _WORKLOADS[row])


def chosen(row: str, names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """The contestants of a row.

    Over slow links one of each kind is enough, and there alone ``delay`` and ``wire`` matter.
    """
    if only:
        return [name for name in names if name in only]
    if row.startswith("f"):
        own = f"{OURS}, wire=" if row == "f-rate" else f"{OURS}, delay="
        few = {ONE, "1F1B, M=4", "ZBV zero bubble, M=2", "DDP", DELAYED, OURS}
        return [name for name in names if name in few or name.startswith(own)]
    return [name for name in names if not name.startswith((f"{OURS}, delay=", f"{OURS}, wire="))]


def microbatches(row: str, stages: int, given: list[int]) -> list[int]:
    """For the schedules: up to four times the stages where these are emulated, as a bubble is a matter of the two."""
    return [stages, 2 * stages, 4 * stages] if row == "e" else given


def measure(condition: Record, options: argparse.Namespace) -> Record | None:
    """Runs one condition; ``None``, with a word, where this machine cannot."""
    workload = workload_of(condition["workload"])
    counts = microbatches(condition["row"], workload.stages, options.microbatches)
    names = chosen(condition["row"], list(contestants(workload, counts)), options.contestants)
    slow = "latency_ms" in condition
    if slow and (condition["megabits"] or _DDP_RATE) < _DDP_RATE and "DDP" in names:
        names.remove("DDP")  # a step would take most of a minute
    arguments = ["--workload", condition["workload"], "--microbatches", *map(str, counts)]
    arguments += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    latency = condition.get("latency_ms", 0) / 1000
    try:
        with Channel(workload.stages, condition["megabits"], latency) if slow else nullcontext() as channel:
            turns = run_group("benchmarks.contest", [*arguments, "--contestants", *names], workload.stages, channel)
            inspected: list[Record] = []
            if options.inspect and not slow:
                for name in names:
                    # In processes of its own: memory that an earlier contestant has left would be taken for its own.
                    command = [*arguments, "--contestants", name, "--inspect"]
                    inspected += run_group("benchmarks.contest", command, workload.stages, None)
    except NoChannelError as error:
        print(f"{condition} is left out. {error}")
        return None
    return {
        **condition,
        "title": workload.title,
        "stages": workload.stages,
        "turns": turns,
        "inspected": inspected,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "torch": torch.__version__},
    }


def together(before: Record, record: Record) -> Record:
    """A condition's record with the rounds of a further pass."""
    rounds = 1 + max(turn["round"] for turn in before["turns"])
    more = [{**turn, "round": turn["round"] + rounds} for turn in record["turns"]]
    return {**before, "turns": before["turns"] + more}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _same(one: Record, other: Record) -> bool:
    return all(one.get(key) == other.get(key) for key in ("row", "workload", "megabits", "latency_ms"))


def main() -> None:
    """Measures, writes the records, and prints and draws what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=1, help="through the conditions of all rows")
    parser.add_argument("--latencies", type=float, nargs="+", default=LATENCIES, help="of row f-latency, in ms")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn that counts")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--contestants", nargs="+", help="only these; by default all")
    parser.add_argument("--stage-ms", type=float, default=300.0, help="of a training step of an emulated stage")
    parser.add_argument("--inspect", action="store_true", help="also memory, and where the time goes")
    parser.add_argument("--out", type=Path, required=True, help="the file of records")
    parser.add_argument("--figure", type=Path, help="draw them, as PNG")
    parser.add_argument("--table", action="store_true", help="measure nothing: print and draw what the file has")
    options = parser.parse_args()
    records: list[Record] = json.loads(options.out.read_text()) if options.out.exists() else []
    chosen_conditions = [
        each
        for row in options.rows
        for each in conditions(row, options.stage_ms)
        if row != "f-latency" or each["latency_ms"] in options.latencies
    ]
    for pass_, condition in () if options.table else product(range(options.passes), chosen_conditions):
        print(f"--- {condition}", flush=True)
        record = measure(condition, options)
        if record is not None:
            before = next((other for other in records if _same(other, record)), None)
            records = [other for other in records if other is not before]
            records.append(record if before is None or pass_ == 0 else together(before, record))
            options.out.write_text(json.dumps(records, indent=1) + "\n")
    print(tables(records))
    if options.figure:
        from benchmarks.throughput_figure import draw

        draw(records, options.figure)


if __name__ == "__main__":
    main()
