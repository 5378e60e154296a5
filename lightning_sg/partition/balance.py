"""Divides a sequence of costs into contiguous runs, so that the most expensive run is as cheap as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balance(
    costs: Sequence[float],
    parts: int,
    ends: Sequence[float] | None = None,
    before_last: Sequence[float] | None = None,
) -> list[int]:
    """Divides a sequence of costs so that the largest sum of a run is minimal.

    Args:
        costs: One cost for each item.
        parts: The number of runs, none of them empty.
        ends: For each item, the extra cost of a run that ends with it. The end of the last run costs nothing.
        before_last: For each item, what it costs besides in every run but the last.

    Returns:
        The index in ``costs`` at which each run begins.
    """
    count = len(costs)
    besides = np.zeros(count) if before_last is None else np.asarray(before_last, dtype=float)
    before = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=float) + besides)])
    after = np.zeros(count) if ends is None else np.asarray(ends, dtype=float)
    # whole[i, j]: the cost of the run of items i to j - 1.
    whole = before[None, :] - before[:, None]
    whole[:, 1:] += after
    whole[:, count] -= after[-1]
    whole[:count, count] -= np.cumsum(besides[::-1])[::-1]
    whole[np.tril_indices(count + 1)] = np.inf  # an empty run
    best = whole[:, count].copy()  # best[i]: the largest cost if items i and later form the runs so far
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
