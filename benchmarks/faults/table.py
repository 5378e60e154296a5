"""The table of a campaign, on the terminal and in the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.faults.campaign import Result
from benchmarks.faults.verdict import KINDS, NAMED, SURVIVED

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def table(results: Iterable[Result]) -> str:
    """A row for each kind of fault: its rounds, and how many ended in which way."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.round.kind, Counter())[result.verdict.kind] += 1
    rows = [["kind", "rounds", *KINDS], ["---", *["---:"] * (1 + len(KINDS))]]
    for kind, found in sorted(counts.items()):
        rows.append([kind, str(found.total()), *(str(found[verdict]) for verdict in KINDS)])
    total = sum(counts.values(), Counter())
    rows.append(["**all**", *(f"**{number}**" for number in (total.total(), *(total[each] for each in KINDS)))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def share_named(results: Iterable[Result]) -> float:
    """Of the rounds that were not survived, the share in which every other rank named the one that failed."""
    kinds = [result.verdict.kind for result in results if result.verdict.kind != SURVIVED]
    return kinds.count(NAMED) / len(kinds) if kinds else 1.0


def put(text: str, page: Path) -> None:
    """Replaces what is between the markers of a page.

    Raises:
        SystemExit: If the page has no markers.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the table: add the lines {BEGIN} and {END}.")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


__all__ = ["BEGIN", "END", "put", "share_named", "table"]
