"""The random campaign: ``python -m benchmarks.faults --rounds 200``."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.channel import Channel, NoChannelError
from benchmarks.faults.campaign import Result, campaign, write
from benchmarks.faults.rounds import KINDS, PRIVILEGED
from benchmarks.faults.table import put, share_named, table
from benchmarks.faults.verdict import NAMED, SURVIVED

_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the campaign, prints the table and writes it into the documentation."""
    options = _parser().parse_args(args)
    kinds = _possible(options.kinds or list(KINDS))
    numbers = list(range(options.rounds)) if options.only is None else options.only
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for result in campaign(options.seed, numbers, kinds, options.jobs, Path(folder)):
            results.append(result)
            if options.records is not None:
                write(result, options.records)
            _show(result, options, len(numbers))
    text = table(results)
    print(f"\n{text}\n\nnamed, of what was not survived: {share_named(results):.1%}")
    if options.page is not None and options.only is None:
        what = f"`python -m benchmarks.faults --rounds {options.rounds} --seed {options.seed}`"
        put(f"{what}, {date.today()}, torch {torch.__version__}:\n\n{text}", options.page)


def _possible(kinds: list[str]) -> list[str]:
    """The kinds that this user and machine can do; the others are skipped with a word."""
    lacking = None if os.geteuid() == 0 else "root"
    if lacking is None and any(kind.startswith("link") for kind in kinds):
        try:
            with Channel(2, None, 0.0):
                pass
        except NoChannelError as error:
            print(f"Skipped: link down. {error}")
            kinds = [kind for kind in kinds if not kind.startswith("link")]
    if lacking and (skipped := [kind for kind in kinds if kind in PRIVILEGED]):
        print(f"Skipped, for they need {lacking}: {'; '.join(skipped)}.")
        kinds = [kind for kind in kinds if kind not in PRIVILEGED]
    return kinds


def _show(result: Result, options: argparse.Namespace, count: int) -> None:
    verdict, outcome = result.verdict, result.outcome
    print(f"[{result.round.number}] {verdict.kind}, {outcome.seconds:.1f} s: {result.round}", flush=True)
    if verdict.kind in (NAMED, SURVIVED) and options.only is None:
        return
    chosen = "".join(f' "{kind}"' for kind in options.kinds or [])
    again = f"python -m benchmarks.faults --seed {options.seed} --only {result.round.number}"
    print(f"    {verdict.why}\n    again: {again}{' --kinds' + chosen if chosen else ''}")
    for ending in outcome.endings.values():
        lines = ending.error.splitlines()[: None if options.only else 1] or ending.log.splitlines()[-3:]
        told = "\n        ".join(line[:400] for line in lines) or "nothing"
        print(f"    rank {ending.rank}, exit code {ending.code}, after {ending.seconds:.1f} s: {told}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="a round follows from this and its number")
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time")
    parser.add_argument("--only", type=int, nargs="+", metavar="ROUND", help="run only these, and say all they say")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--records", type=Path, help="a file that gets a line of JSON for each round")
    parser.add_argument("--page", type=Path, default=_PAGE, help="the page that gets the table")
    return parser


if __name__ == "__main__":
    main()
