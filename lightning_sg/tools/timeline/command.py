"""``lightning-sg timeline``: the stages of a run side by side."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.profiling import KINDS, LIGHTNING
from lightning_sg.tools.text import aligned
from lightning_sg.tools.timeline.spans import Span, batches_of, read_spans, shares_of


def main(args: Sequence[str] | None = None) -> None:
    """Puts the trace files of all processes together, draws them, and prints where the time goes.

    Args:
        args: The arguments after ``timeline``; by default those of the process.

    Raises:
        SystemExit: If there is nothing to draw, with the reason.
    """
    arguments = parser().parse_args(args)
    try:
        stages = read(arguments.folder)
    except SyntheticGradientsError as error:
        raise SystemExit(str(error)) from None
    print(table(stages))
    together = arguments.folder / "timeline.json"
    together.write_text(json.dumps({"traceEvents": _events(stages)}))
    print(f"\nWritten: {together}  (for chrome://tracing or ui.perfetto.dev)")
    if importlib.util.find_spec("matplotlib") is None:
        print('No picture: matplotlib is missing (pip install "lightning-sg[report]").')
        return
    from lightning_sg.tools.timeline.draw import draw

    picture = arguments.folder / "timeline.png"
    picture.write_bytes(draw(stages, arguments.batches))
    print(f"Written: {picture}")


def parser() -> argparse.ArgumentParser:
    """The arguments of ``timeline``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg timeline",
        description="Draws what each process of a run with Trainer(profiler=lightning_sg.Timeline()) did when, and "
        "says where its time went.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder with the trace files")
    parser.add_argument("--batches", type=int, default=8, help="how many batches to draw (default: 8)")
    return parser


def read(folder: Path) -> dict[str, list[Span]]:
    """The spans of every process by its name, from the first stage to the last.

    Args:
        folder: With one trace file for each process, as :class:`~lightning_sg.Timeline` writes them.

    Raises:
        SyntheticGradientsError: If there are none.
    """
    by_rank: dict[int, list[Span]] = {}
    for path in sorted(folder.glob("fit-*.json")):
        by_rank |= read_spans(path)
    if not any(batches_of(spans) for spans in by_rank.values()):
        raise SyntheticGradientsError(
            f"{folder} has no trace of a training batch. Train with Trainer(profiler=lightning_sg.Timeline()), for "
            "more batches than it skips; the files fit-*.json then are in the logger's folder, or in the trainer's "
            "default_root_dir."
        )
    if len(by_rank) == 1:
        return {"one process": next(iter(by_rank.values()))}
    # The last stage is on rank 0.
    return {f"process {place} (rank {rank})": by_rank[rank] for place, rank in enumerate(sorted(by_rank, reverse=True))}


def table(stages: dict[str, list[Span]]) -> str:
    """Where the time of each process goes: milliseconds a batch, and shares."""
    shares = {name: shares_of(spans) for name, spans in stages.items()}
    kinds = [kind for kind in (*KINDS, LIGHTNING) if any(kind in each for each in shares.values())]
    rows = [["", "ms a batch", *kinds]]
    for name, each in shares.items():
        starts = [batch.start for batch in batches_of(stages[name])]
        gaps = [1000 * (after - before) for before, after in itertools.pairwise(starts)]
        middle = f"{statistics.median(gaps):.1f}" if gaps else "-"
        rows.append([name, middle, *(f"{each.get(kind, 0.0):.1%}" for kind in kinds)])
    return "\n".join(aligned(rows))


def _events(stages: dict[str, list[Span]]) -> list[dict[str, object]]:
    events: list[dict[str, object]] = []
    for place, (name, spans) in enumerate(stages.items()):
        events.append({"name": "process_name", "ph": "M", "pid": place, "args": {"name": name}})
        events += [span.event(place) for span in spans]
    return events


__all__ = ["main", "parser", "read", "table"]
