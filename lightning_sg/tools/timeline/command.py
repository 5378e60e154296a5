"""``lightning-sg timeline``: merges the trace files of a run, draws them and prints where the time goes."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_sg.arguments import checked, whole
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.files import write_atomically, write_text_atomically
from lightning_sg.profiling import KINDS, LIGHTNING
from lightning_sg.tools.text import aligned
from lightning_sg.tools.timeline.chrome import events_of, read_spans, trace_text
from lightning_sg.tools.timeline.spans import Span, batches_of, shares_of


def main(args: Sequence[str] | None = None) -> None:
    """Merges the trace files of all processes, draws them, and prints where the time goes.

    Args:
        args: The arguments after ``timeline``; by default those of the process.

    Raises:
        SystemExit: If no trace has a training batch, with the reason.
    """
    arguments = parser().parse_args(args)
    try:
        stages = read(arguments.folder)
    except SyntheticGradientsError as error:
        raise SystemExit(str(error)) from None
    print(table(stages))
    merged = arguments.folder / "timeline.json"
    write_text_atomically(merged, _merged(stages))
    print(f"\nWritten: {merged}  (for chrome://tracing or ui.perfetto.dev)")
    if importlib.util.find_spec("matplotlib") is None:
        print('No picture: matplotlib is missing (pip install "lightning-sg[report]").')
        return
    from lightning_sg.tools.timeline.draw import draw

    picture = arguments.folder / "timeline.png"
    with write_atomically(picture) as file:
        file.write(draw(stages, arguments.batches))
    print(f"Written: {picture}")


def parser() -> argparse.ArgumentParser:
    """The arguments of ``timeline``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg timeline",
        description="Draws when each process did what in a run with Trainer(profiler=lightning_sg.Timeline()), and "
        "prints where its time went.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder with the trace files")
    parser.add_argument("--batches", type=_batches, default=8, help="how many batches to draw (default: 8)")
    return parser


def _batches(value: str) -> int:
    try:
        return checked("timeline", "--batches", int(value), whole(1, 100_000))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to 100,000, not {value!r}") from error


def read(folder: Path) -> dict[str, list[Span]]:
    """Reads the trace files of a run.

    Args:
        folder: The folder with the files that :class:`~lightning_sg.Timeline` wrote, one for each process.

    Returns:
        The spans of every process by its name, from the first stage to the last.

    Raises:
        SyntheticGradientsError: If a file is not a trace, or none has a training batch.
    """
    by_rank: dict[int, list[Span]] = {}
    for path in sorted(folder.glob("fit-*.json")):
        by_rank |= read_spans(path)
    if not any(batches_of(spans) for spans in by_rank.values()):
        raise SyntheticGradientsError(
            f"{folder} has no trace of a training batch. Train with Trainer(profiler=lightning_sg.Timeline()), for "
            "more batches than it skips. The files fit-*.json are then in the logger's folder, or in the trainer's "
            "default_root_dir."
        )
    if len(by_rank) == 1:
        return {"one process": next(iter(by_rank.values()))}
    # The last stage is on rank 0.
    return {f"process {place} (rank {rank})": by_rank[rank] for place, rank in enumerate(sorted(by_rank, reverse=True))}


def table(stages: dict[str, list[Span]]) -> str:
    """Formats where the time goes: for each process, milliseconds per batch and the share of each kind of work.

    Args:
        stages: The spans of each process by its name.
    """
    shares = {name: shares_of(spans) for name, spans in stages.items()}
    kinds = [kind for kind in (*KINDS, LIGHTNING) if any(kind in each for each in shares.values())]
    rows = [["", "ms a batch", *kinds]]
    for name, each in shares.items():
        starts = [batch.start for batch in batches_of(stages[name])]
        gaps = [1000 * (after - before) for before, after in itertools.pairwise(starts)]
        typical = f"{statistics.median(gaps):.1f}" if gaps else "-"
        rows.append([name, typical, *(f"{each.get(kind, 0.0):.1%}" for kind in kinds)])
    return "\n".join(aligned(rows))


def _merged(stages: dict[str, list[Span]]) -> str:
    """One trace of all processes, numbered from the first stage to the last."""
    events = [event for place, (name, spans) in enumerate(stages.items()) for event in events_of(spans, place, name)]
    return trace_text(events)


__all__ = ["main", "parser", "read", "table"]
