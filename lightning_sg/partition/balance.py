"""Divides a chain of costs into runs of neighbours, so that the largest is as small as can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balance(costs: Sequence[float], parts: int, ends: Sequence[float] | None = None) -> list[int]:
    """Divides a chain.

    Args:
        costs: Of the links of the chain.
        parts: How many runs of neighbours to divide it into, none of them empty.
        ends: What a run costs besides if it ends with that link; the last run's end costs nothing.

    Returns:
        The place in ``costs`` where each run begins.
    """
    count = len(costs)
    before = np.concatenate([[0.0], np.cumsum(costs)])
    after = np.zeros(count) if ends is None else np.asarray(ends, dtype=float)
    # whole[i, j]: the cost of a run from link i up to, not including, link j.
    whole = before[None, :] - before[:, None]
    whole[:, 1:] += after
    whole[:, count] -= after[-1]
    whole[np.tril_indices(count + 1)] = np.inf  # an empty run
    best = whole[:, count].copy()  # of the links from i on, in the runs so far
    choices: list[np.ndarray] = []
    for _ in range(parts - 1):
        worst = np.maximum(whole, best[None, :])
        choices.append(worst.argmin(axis=1))
        best = worst.min(axis=1)
    starts = [0]
    for choice in reversed(choices):
        starts.append(int(choice[starts[-1]]))
    return starts


__all__ = ["balance"]
