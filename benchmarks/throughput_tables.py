"""What the throughput benchmark's records say, as tables."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.contestants import COPIES, ONE

Record = dict[str, Any]


def speeds_of(record: Record) -> dict[str, list[float]]:
    """Samples a second of each contestant, round by round."""
    speeds: dict[str, list[float]] = {}
    for turn in sorted(record["turns"], key=lambda turn: turn["round"]):
        speeds.setdefault(turn["contestant"], []).append(turn["speed"])
    return speeds


def ratio(speeds: dict[str, list[float]], name: str, to: str) -> float | None:
    """The median of the rounds' ratios of two contestants, which a drifting machine disturbs less than medians'."""
    if name not in speeds or to not in speeds:
        return None
    return statistics.median(one / other for one, other in zip(speeds[name], speeds[to]))


def tables(records: list[Record]) -> str:
    """All of them, in Markdown."""
    parts = [_table(record) for record in records if "latency_ms" not in record]
    parts += [_links([r for r in records if r["row"] == row], row) for row in ("f-rate", "f-latency")]
    return "\n\n".join(part for part in parts if part)


def _table(record: Record) -> str:
    speeds = speeds_of(record)
    inspected = {each["contestant"]: each["ranks"] for each in record["inspected"]}
    head = ["contestant", "samples/s, median (min-max)", "over one process", "of the ceiling", "at work, by rank"]
    if inspected:
        head += ["activations, MiB by rank", "resident, MiB by rank"]
    rows = [head, ["---"] * len(head)]
    for name, values in speeds.items():
        over, of = ratio(speeds, name, ONE), ratio(speeds, name, COPIES)
        row = [name, f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"]
        row += ["" if share is None else f"{share:.2f}" for share in (over, of)]
        row.append(_at_work(record, name))
        if inspected:
            row += [_mebibytes(inspected.get(name, []), key) for key in ("activations", "resident")]
        rows.append(row)
    rounds = max(map(len, speeds.values()))
    title = f"### ({record['row']}) {record['title']}\n\n{record['stages']} processes, {rounds} rounds.\n\n"
    return title + _markdown(rows) + _shares(inspected)


def _at_work(record: Record, name: str) -> str:
    """The share of the time in which each rank's main thread worked; of emulated stages, without their sleep."""
    turns = [turn["paces"] for turn in record["turns"] if turn["contestant"] == name]
    ranks = [[pace["worked"] / pace["seconds"] for pace in paces if pace] for paces in zip(*turns)]
    return ", ".join(f"{statistics.median(rank):.0%}" for rank in ranks if rank)


def _mebibytes(ranks: list[Any], key: str) -> str:
    return ", ".join(f"{rank[key] / 2**20:.0f}" for rank in ranks if rank)


def _shares(inspected: dict[str, list[Any]]) -> str:
    """What a step's time goes into, where Lightning's profiler saw it."""
    seen = {name: [rank["shares"] for rank in ranks if rank and rank["shares"]] for name, ranks in inspected.items()}
    kinds = list(dict.fromkeys(kind for ranks in seen.values() for shares in ranks for kind in shares))
    if not kinds:
        return ""
    rows = [["contestant, rank", *kinds], ["---"] * (1 + len(kinds))]
    for name, ranks in seen.items():
        for place, shares in enumerate(ranks):
            rows.append([f"{name}, {place}", *(f"{shares.get(kind, 0):.1%}" for kind in kinds)])
    return "\n\n" + _markdown(rows)


def link_of(record: Record) -> str:
    """The network of a record, in words."""
    if record["row"] == "f-latency":
        return f"{record['latency_ms']} ms"
    return "unlimited" if record["megabits"] is None else f"{record['megabits']} Mbit/s"


def _links(records: list[Record], row: str) -> str:
    """A table of the contestants over links: over one process, and in brackets of their own speed on the best link."""
    if not records:
        return ""
    best = speeds_of(records[0])
    lines = [["contestant", *map(link_of, records)], ["---"] * (1 + len(records))]
    for name in best:
        cells = []
        for record in records:
            speeds = speeds_of(record)
            over = ratio(speeds, name, ONE)
            own = statistics.median(speeds[name]) / statistics.median(best[name]) if name in speeds else None
            cells.append("" if over is None else f"{over:.2f} ({own:.2f})")
        lines.append([name, *cells])
    what = "limited bandwidth" if row == "f-rate" else "added latency, each way"
    explained = "Speed-up over one process; in brackets, relative to the same contestant on the first link."
    return f"### (f) {records[0]['title']}, {what}\n\n{explained}\n\n" + _markdown(lines)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


__all__ = ["link_of", "ratio", "speeds_of", "tables"]
