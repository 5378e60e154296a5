"""How models of other people's packages train decoupled, beside plain training: the table in docs/compatibility.md.

    make test-clients                                                 # installs the packages in .venv-clients
    .venv-clients/bin/python -m benchmarks.clients --seeds 0 1 2      # appends to benchmarks/clients.jsonl
    .venv/bin/python -m tests.compatibility                           # writes the page

Plain training is watched until its loss has come down to half of what it was at first; decoupled training has as many
steps. All losses are means over as many batches as an epoch has, for both the same batches in the same order, so that
their ratio has no noise of the data in it. Each client is trained in a program of its own. What the file has is not
done again.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.clients.runs import CLIENTS, Run

RECORDS = Path(__file__).parent / "clients.jsonl"
#: The fewest batches that a loss is averaged over.
FEWEST = 5
WEIGHTS_EQUAL = 1e-6


def steps_to_half(losses: Sequence[float], window: int) -> int | None:
    """After how many steps the mean of the last ``window`` losses is half of that of the first; ``None`` if never.

    Args:
        losses: Of each step.
        window: How many losses are averaged.
    """
    half = mean_before(losses, window, window) / 2
    return next((end for end in range(window, len(losses) + 1) if mean_before(losses, end, window) <= half), None)


def mean_before(losses: Sequence[float], end: int, window: int) -> float:
    """The mean of the ``window`` losses before step ``end``."""
    return statistics.mean(losses[end - window : end])


def compare(plain: Run, decoupled: Run, late: Run) -> dict[str, Any]:
    """The steps that all had, their losses, and whether plain training came down to half.

    Args:
        plain: The plain run.
        decoupled: That with the callback's default settings.
        late: That with late gradients mixed in.
    """
    window = max(plain.per_epoch, FEWEST)
    half = steps_to_half(plain.losses, window)
    steps = len(plain.losses) if half is None else half
    return {
        "steps": steps,
        "halved": half is not None,
        "plain": mean_before(plain.losses, steps, window),
        "decoupled": mean_before(decoupled.losses, steps, window),
        "late": mean_before(late.losses, steps, window),
    }


def source_of(runs: Iterable[Run]) -> str:
    """What the predictors say that they predict from; empty if they say nothing."""
    lines = [line for run in runs for line in run.said]
    found = [match[1] for line in lines if (match := re.search(r"predicts from (.+?)[.;]?(?:\s*$)", line))]
    return found[0] if found else ""


def outcome(runs: dict[str, Any], several: str, one: str) -> str:
    """Whether two processes trained, and as one does."""
    ranks, alone = runs.get(several), runs.get(one)
    if not isinstance(ranks, list):
        return f"fails: {getattr(ranks, 'kind', 'no result')}"
    if not isinstance(alone, Run):
        return f"one process fails: {getattr(alone, 'kind', 'no result')}"
    largest = max(
        float((alone.state[key].double() - rank.state[key].double()).abs().max())
        for rank in ranks
        for key in alone.state
        if alone.state[key].numel()
    )
    return "yes" if largest <= WEIGHTS_EQUAL else f"weights differ by {largest:.1g}"


def record_of(name: str, runs: dict[str, Any], seeds: dict[int, Any]) -> dict[str, Any]:
    """All that the table says of a client."""
    callback = runs["callback"]
    return {
        "client": name,
        "package": CLIENTS[name].distribution,
        "version": version(CLIENTS[name].distribution),
        "callback": "yes" if isinstance(callback, Run) else f"fails: {getattr(callback, 'kind', 'no result')}",
        "split": outcome(runs, "split", "callback"),
        "auto": outcome(runs, "auto", "auto in one"),
        "boundaries": callback.boundaries if isinstance(callback, Run) else [],
        "predicts_from": source_of([callback]) if isinstance(callback, Run) else "",
        "seeds": {
            str(seed): compare(*runs) for seed, runs in seeds.items() if all(isinstance(run, Run) for run in runs)
        },
    }


def table(records: Iterable[dict[str, Any]]) -> str:
    """The records as Markdown; of several for one client, the last counts."""
    newest = {record["client"]: record for record in records}
    lines = [
        "| model | package | one process | two processes | automatic boundaries | predicts from | loss beside plain "
        "| with late gradients |",
        "|---" * 8 + "|",
    ]
    lines += [_row(newest[name]) for name in CLIENTS if name in newest]
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> str:
    cells = [
        record["client"],
        f"{record['package']} {record['version']}",
        record["callback"],
        record["split"],
        record["auto"],
        record["predicts_from"] or "nothing found",
        _beside(list(record["seeds"].values())),
        _ratio([seed["late"] / seed["plain"] for seed in record["seeds"].values()]),
    ]
    return "| " + " | ".join(cells) + " |"


def _beside(seeds: Sequence[dict[str, Any]]) -> str:
    """The ratio of the losses over the seeds: mean, smallest and largest."""
    if not seeds:
        return "-"
    steps = sorted({seed["steps"] for seed in seeds})
    after = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    short = "" if all(seed["halved"] for seed in seeds) else ", not halved"
    return f"{_ratio([seed['decoupled'] / seed['plain'] for seed in seeds])} after {after} steps{short}"


def _ratio(ratios: Sequence[float]) -> str:
    """The mean, the smallest and the largest."""
    if not ratios:
        return "-"
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"× {statistics.mean(ratios):.2f}{spread}"


def read(path: Path = RECORDS) -> list[dict[str, Any]]:
    """The records of a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Trains one client in a program of its own, which imports its package only."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "runs.pickle"
        command = [sys.executable, "-m", "tests.clients", name, str(out), *map(str, seeds)]
        subprocess.run(command, check=True)
        runs = pickle.loads(out.read_bytes())
    return record_of(name, runs, runs.pop("seeds"))


def main() -> None:
    """Measures what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=list(CLIENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--again", action="store_true", help="also what the file has")
    parser.add_argument("--table", action="store_true", help="print the table of the file, and measure nothing")
    options = parser.parse_args()
    if not options.table:
        known = set() if options.again else {record["client"] for record in read(options.out)}
        for name in options.clients:
            if name not in known:
                record = measure(name, options.seeds)
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(read(options.out)))


if __name__ == "__main__":
    main()


__all__ = ["compare", "mean_before", "record_of", "source_of", "steps_to_half", "table"]
