"""Kinds of faults that are no failure of a rank at a moment: odd settings, data, checkpoints, disks and links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.channel import Channel, NoChannelError
from benchmarks.faults.campaign import Undisturbed, run_round
from benchmarks.faults.rounds import PRIVILEGED, draw_round
from benchmarks.faults.verdict import NAMED, SURVIVED
from benchmarks.faults.warm import Warm

#: For each kind, rounds of two processes that differ in what matters: what is odd, or whole and sharded checkpoints.
ROUNDS = {
    "SIGTERM": (0,),
    "NaN": (0, 5),
    "odd data": (0, 6),
    "settings": (0, 6),
    "checkpoint, truncated": (0, 10),
    "checkpoint, bit flipped": (0, 10),
    "checkpoint, planted": (0, 10),
    "full disk": (0,),
    "link down, short": (0,),
    "link down": (0,),
}


def skip_if_impossible(kind: str) -> None:
    if kind in PRIVILEGED and os.geteuid():
        pytest.skip(f"{kind} needs root")
    if kind.startswith("link"):
        try:
            with Channel(2, None, 0.0):
                pass
        except NoChannelError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind, all in ROUNDS.items() for number in all])
def test_each_kind_is_named_or_survived(
    kind: str, number: int, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    skip_if_impossible(kind)
    result = run_round(warm, undisturbed, draw_round(1, number, tmp_path / "round", [kind]), seed=1)
    assert result.verdict.kind in (NAMED, SURVIVED), f"{result.round}: {result.verdict.kind}, {result.verdict.why}"
