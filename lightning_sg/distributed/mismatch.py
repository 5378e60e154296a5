"""Says in what the batches that two neighbouring stages were given differ."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sg.distributed.status import Place, ProcessStatus
from lightning_sg.errors import BatchMismatchError, BoundaryError

Shapes = list[tuple[int, ...]]


def mismatch(status: ProcessStatus, neighbour: str, differences: Sequence[str]) -> BatchMismatchError:
    """The error for two stages that were given different batches.

    Args:
        status: This process.
        neighbour: The other, in words.
        differences: In what they differ, with the neighbour as "the latter".
    """
    return BatchMismatchError(
        f"{status.name} and {neighbour} were given different batches at {status.doing}: {'; '.join(differences)}. "
        "Every stage must load the same data in the same order: seed all processes alike (`seed_everything`), draw "
        "random augmentations from torch's generator, and take a replica's part of the data by "
        "`trainer.strategy.distributed_sampler_kwargs`, not by the process's rank."
    )


def other_count(status: ProcessStatus, neighbour: str, boundary: str, theirs: int, why: str = "") -> BoundaryError:
    """The error for two stages of which one crosses the boundary between them more often than the other.

    Args:
        status: This process.
        neighbour: The other, in words.
        boundary: The boundary between the two.
        theirs: How often the other has crossed it.
        why: Why its step has not gone on, if that is known.
    """
    times = "once" if theirs == 1 else f"{theirs} times"
    because = f" There {why}." if why else ""
    return BoundaryError(
        f"In {status.doing}, {status.name} comes to boundary '{boundary}' another number of times than {neighbour}, "
        f"which has crossed it {times}.{because} How often a step runs the network may depend on the batch and its "
        "number, but not on values of activations or losses, which one process has and the other has not. With manual "
        "optimization, or where the first steps show that the number differs, every process runs the whole step."
    )


def other_place(theirs: Place, ours: Place) -> list[str]:
    """That the neighbour is at another batch, or that one of the two will come to the end of its data first."""
    if theirs.doing != ours.doing:
        (kind, number), (own_kind, own_number) = _parts(theirs.doing), _parts(ours.doing)
        who = "one of the two"
        if kind == own_kind:
            who = "the latter" if number < own_number else "this process"
        return [f"the latter is at {theirs.doing} already, because {who} was given fewer batches before"]
    if theirs.batches != ours.batches:
        return [f"the latter's data loader gives {_count(theirs)} batches, here {_count(ours)}"]
    return other_end(theirs.last, ours.last)


def _parts(doing: str) -> tuple[str, int]:
    """The kind of batch and its number."""
    kind, _, number = doing.rpartition(" ")
    return kind, int(number) if number.isdecimal() else 0


def _count(place: Place) -> str:
    return "an unknown number of" if place.batches is None else str(place.batches)


def other_end(theirs: bool, ours: bool) -> list[str]:
    """That a batch is the last of one of the two only."""
    if theirs == ours:
        return []
    who, other = ("the latter", "this process") if theirs else ("this process", "the latter")
    return [f"it is the last batch of {who}, which was given fewer batches than {other}"]


def other_shapes(sent: Shapes, own: Shapes) -> list[str]:
    """That the activations do not fit, and why, as far as the numbers of samples say."""
    if sent == own:
        return []
    what = f"the latter's has activations of shape {sent} where {own} are due"
    samples, own_samples = ({shape[:1] for shape in shapes} for shapes in (sent, own))
    rest, own_rest = ([shape[1:] for shape in shapes] for shapes in (sent, own))
    if rest == own_rest and len(samples) == len(own_samples) == 1 and () not in samples | own_samples:
        what += f": the latter's batch has {next(iter(samples))[0]} samples, here {next(iter(own_samples))[0]}"
    return [what]


__all__ = ["mismatch", "other_count", "other_end", "other_place", "other_shapes"]
