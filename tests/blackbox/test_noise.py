"""Exploration noise: one deviation or one for each position, and its schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sg import BlackBox, Noise

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("schedule", "half"), [("linear", 0.55), ("cosine", 0.55), ("exponential", pytest.approx(0.31623, abs=1e-4))]
)
def test_a_schedule_goes_from_the_deviation_to_the_final_one(schedule: Any, half: float) -> None:
    noise = Noise(1.0, final=0.1, steps=10, schedule=schedule)
    assert [float(noise.at(step, CPU)) for step in (0, 5, 10, 999)] == pytest.approx([1.0, half, 0.1, 0.1])


def test_deviations_of_several_positions_shrink_in_proportion() -> None:
    noise = Noise([0.2, 0.0, 0.4], final=0.1, steps=4)
    torch.testing.assert_close(noise.at(4, CPU), torch.tensor([0.05, 0.0, 0.1]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"deviation": -1}, "deviation"),
        ({"final": 0.1}, "both"),
        ({"steps": 5}, "both"),
        ({"deviation": 0.0, "final": 0.1, "steps": 5}, "no schedule"),
        ({"final": 0.0, "steps": 5, "schedule": "exponential"}, "above 0"),
    ],
)
def test_nonsense_is_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Noise(**arguments)
    with pytest.raises(TypeError, match="noise"):
        BlackBox(noise="much")  # type: ignore[arg-type]
