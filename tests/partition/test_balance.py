"""Costs are divided so that the largest part is as small as possible."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_sg.partition.balance import balance


def slowest(costs: list[float], starts: list[int], ends: list[float]) -> float:
    bounds = [*starts, len(costs)]
    runs = itertools.pairwise(bounds)
    return max(sum(costs[start:end]) + (ends[end - 1] if end < len(costs) else 0) for start, end in runs)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_the_slowest_process_is_as_fast_as_with_any_other_cut(parts: int) -> None:
    draw = random.Random(parts)
    for _ in range(60):
        count = draw.randint(parts, 9)
        costs = [draw.choice([0.0, 1.0, draw.random() * 10]) for _ in range(count)]
        for ends in (None, [draw.choice([0.0, draw.random() * 5]) for _ in range(count)]):
            starts = balance(costs, parts, ends)
            cuts = itertools.combinations(range(1, count), parts - 1)
            best = min(slowest(costs, [0, *cut], ends or [0.0] * count) for cut in cuts)
            assert slowest(costs, starts, ends or [0.0] * count) == pytest.approx(best)
            assert starts[0] == 0
            assert starts == sorted(set(starts))
            assert len(starts) == parts
