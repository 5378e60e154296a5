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


def steps(position: int, count: int = 1, diverge: bool = False, seeded: int = 1) -> list[float]:
    """What a process draws in its first steps."""
    seed(seeded)
    randomness = StepRandomness(position, CPU)
    drawn: list[float] = []
    for _ in range(count):
        with randomness:
            if diverge:
                randomness.diverge()
            drawn += draw()
        draw()
    return drawn


def test_outside_a_step_it_is_as_if_nothing_had_been_drawn() -> None:
    seed(1)
    expected = draw(), draw()
    seed(1)
    randomness = StepRandomness(0, CPU)
    with randomness:
        draw()
    first = draw()
    with randomness:
        randomness.diverge()
        draw()
    assert (first, draw()) == expected
    assert torch.initial_seed() == 1


def test_a_step_begins_with_the_same_numbers_in_every_process() -> None:
    assert steps(0, count=3) == steps(2, count=3)


def test_at_its_own_stages_each_process_draws_numbers_of_its_own() -> None:
    drawn = [steps(0), *(steps(position, diverge=True) for position in range(3))]
    for kind in zip(*drawn):
        assert len(set(kind)) == 4


def test_every_step_draws_other_numbers_and_none_draws_those_outside() -> None:
    for diverge in (False, True):
        seed(1)
        drawn = [*draw(), *steps(0, count=3, diverge=diverge)]
        assert len(set(drawn)) == 12


def test_the_seed_decides_what_a_step_draws() -> None:
    assert steps(1, diverge=True) == steps(1, diverge=True)
    assert steps(1, diverge=True) != steps(1, diverge=True, seeded=2)
    assert steps(1) != steps(1, seeded=2)


def test_an_exception_in_a_step_leaves_the_numbers_outside_alone() -> None:
    seed(1)
    expected = draw()
    seed(1)

    def step() -> None:
        with StepRandomness(0, CPU):
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
