"""Costs are divided so that the largest part is as small as possible."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_sg.partition.balance import balance


def slowest(costs: list[float], starts: list[int], ends: list[float], before_last: list[float]) -> float:
    *others, (last, count) = itertools.pairwise([*starts, len(costs)])
    both = [cost + besides for cost, besides in zip(costs, before_last)]
    return max(sum(costs[last:count]), *(sum(both[start:end]) + ends[end - 1] for start, end in others), 0.0)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_the_slowest_process_is_as_fast_as_with_any_other_cut(parts: int) -> None:
    draw = random.Random(parts)
    for _ in range(60):
        count = draw.randint(parts, 9)
        costs = [draw.choice([0.0, 1.0, draw.random() * 10]) for _ in range(count)]
        more = [draw.choice([0.0, draw.random() * 5]) for _ in range(2 * count)]
        for ends, before_last in ((None, None), (more[:count], None), (more[:count], more[count:])):
            starts = balance(costs, parts, ends, before_last)
            cuts = itertools.combinations(range(1, count), parts - 1)
            added = ends or [0.0] * count, before_last or [0.0] * count
            best = min(slowest(costs, [0, *cut], *added) for cut in cuts)
            assert slowest(costs, starts, *added) == pytest.approx(best)
            assert starts[0] == 0
            assert starts == sorted(set(starts))
            assert len(starts) == parts
