"""A ring of rows: the newest are kept, and drawn with replacement."""

from __future__ import annotations

import pytest
import torch

from lightning_sg.blackbox.estimator import Example
from lightning_sg.blackbox.replay import Replay


def rows(first: int, count: int) -> Example:
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    column = numbers.unsqueeze(1)
    return Example(column, column + 0.5, torch.tensor(0.1), [column * 2], numbers)


def test_the_newest_rows_are_kept_in_order() -> None:
    replay = Replay(5)
    assert replay.rows() is None
    for first in range(0, 12, 3):
        replay.add(rows(first, 3))
    kept = replay.rows()
    assert kept is not None
    assert kept.score.tolist() == [7, 8, 9, 10, 11]
    assert torch.equal(kept.value, kept.activation + 0.5)
    assert torch.equal(kept.context[0], kept.activation * 2)


def test_more_rows_than_fit_leave_the_last_ones() -> None:
    replay = Replay(2)
    replay.add(rows(0, 7))
    kept = replay.rows()
    assert kept is not None
    assert (len(replay), kept.score.tolist()) == (2, [5, 6])


def test_drawn_rows_stay_together() -> None:
    replay = Replay(100)
    replay.add(rows(0, 50))
    drawn = replay.sample(400, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.activation[:, 0], drawn.score)
    assert torch.equal(drawn.context[0][:, 0], 2 * drawn.score)
    assert len(drawn.score.unique()) == 50


def test_rows_of_other_shapes_are_refused() -> None:
    replay = Replay(9)
    replay.add(rows(0, 3))
    with pytest.raises(ValueError, match="only the number of samples may change"):
        replay.add(Example(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.1), [torch.ones(2, 1)], torch.ones(2)))
