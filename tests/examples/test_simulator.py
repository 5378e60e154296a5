"""The pendulum that SciPy integrates."""

from __future__ import annotations

import numpy as np
import pytest

from examples.simulator import FRAMES, PIECE, TORQUES, cost_of, pendulums, simulate, train

pytest.importorskip("scipy")


def test_a_pendulum_at_rest_stays_there_and_a_torque_moves_it():
    start, nothing = np.zeros((2, 2)), np.zeros((2, TORQUES))
    still = simulate(start, nothing)
    assert still.shape == (2, 1 + TORQUES * FRAMES, 2)
    assert np.abs(still).max() == 0
    assert simulate(start, nothing + 0.3)[:, -1, 0].min() > 0.1
    np.testing.assert_array_equal(simulate(start, nothing + 5), simulate(start, nothing + 1))


def test_a_free_pendulum_loses_energy_by_friction_alone():
    swing = simulate(np.array([[0.8, 0.0]]), np.zeros((1, TORQUES)))[0]
    energy = swing[:, 1] ** 2 / 2 - 3 * np.cos(swing[:, 0])
    assert (np.diff(energy) < 1e-4).all()
    lost = energy[0] - energy[-1]
    by_friction = 0.2 * (swing[1:, 1] ** 2).mean() * TORQUES * PIECE
    assert lost == pytest.approx(by_friction, rel=0.1)


def test_at_rest_at_the_goal_nothing_is_to_be_paid():
    swing = np.zeros((3, 4, 2))
    assert cost_of(swing, np.zeros(3), np.zeros((3, TORQUES))).tolist() == [0, 0, 0]
    assert (cost_of(swing, np.ones(3), np.ones((3, TORQUES))) == 1.01).all()


def test_training_draws_a_picture_and_says_what_was_gained(tmp_path):
    pytest.importorskip("matplotlib")
    costs = train(steps=3, batch_size=8, plot=tmp_path / "plots" / "simulator.png")
    assert costs.keys() == {"before", "after"}
    assert (tmp_path / "plots" / "simulator.png").read_bytes().startswith(b"\x89PNG")


def test_pendulums_are_the_same_for_a_seed():
    assert all(np.array_equal(a, b) for a, b in zip(pendulums(9, 1).tensors, pendulums(9, 1).tensors))


@pytest.mark.slow
def test_it_learns_to_steer():
    costs = train(steps=150)
    assert costs["after"] < 0.2 * costs["before"]
