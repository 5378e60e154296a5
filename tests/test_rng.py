"""Random numbers in the steps of several processes, and outside them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning_sg.rng import StepRandomness, random_state, set_random_state, unchanged_randomness

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def steps(stages: int = 1, count: int = 1, seeded: int = 1, training: bool = True, after: int = 0) -> list[float]:
    """What is drawn in so many steps, in each of their stages."""
    seed(seeded)
    randomness = StepRandomness(CPU)
    drawn: list[float] = []
    for number in range(count):
        randomness.count(after + (number if training else 0), training=training)
        with randomness:
            drawn += draw()
            for _ in range(stages - 1):
                randomness.next_stage()
                drawn += draw()
        draw()
    return drawn


def test_outside_a_step_it_is_as_if_nothing_had_been_drawn() -> None:
    seed(1)
    expected = draw(), draw()
    seed(1)
    randomness = StepRandomness(CPU)
    with randomness:
        draw()
    first = draw()
    with randomness:
        randomness.next_stage()
        draw()
    assert (first, draw()) == expected
    assert torch.initial_seed() == 1


def test_a_stage_has_the_same_numbers_whatever_was_drawn_before_it() -> None:
    seed(1)
    randomness, drawn = StepRandomness(CPU), []
    for before in range(3):
        randomness.count(0, training=True)
        with randomness:
            for _ in range(before):
                draw()
            randomness.next_stage()
            drawn.append(draw())
    assert drawn[0] == drawn[1] == drawn[2]


def test_every_stage_of_every_step_draws_other_numbers_and_none_draws_those_outside() -> None:
    seed(1)
    drawn = [*draw(), *steps(3, 4), *steps(3, 4, training=False)]
    assert len(set(drawn)) == 3 + 2 * 36


def test_the_seed_and_the_place_in_training_decide_what_a_step_draws() -> None:
    assert steps(2, 3) == steps(2, 3)
    assert steps(2, 3)[6:] == steps(2, 2, after=1)
    assert steps(2) != steps(2, seeded=2)


def test_an_exception_in_a_step_leaves_the_numbers_outside_alone() -> None:
    seed(1)
    expected = draw()
    seed(1)

    def step() -> None:
        with StepRandomness(CPU):
            draw()
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        step()
    assert draw() == expected


def test_what_is_drawn_under_unchanged_randomness_does_not_count() -> None:
    seed(1)
    expected = draw()
    seed(1)
    with unchanged_randomness():
        assert draw() == expected
    assert draw() == expected


def test_all_generators_return_to_a_remembered_state() -> None:
    state = random_state()
    expected = draw()
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected
