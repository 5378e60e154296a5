"""What one would write by hand in place of a ``BlackBox``: a critic and REINFORCE in bare torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

INPUTS, CONTROLS, NOISE, BATCH = 10, 4, 0.1, 64


def simulate(controls: np.ndarray) -> np.ndarray:
    """A sine, a product and steps, ``(N, 4)`` to ``(N,)``; the last control does nothing."""
    return np.sin(controls[:, 0]) * controls[:, 1] + np.round(4 * controls[:, 2]) / 4


def costs(controls: Tensor, goal: Tensor) -> Tensor:
    """The squared distance of each outcome from its goal, ``(N,)``."""
    outcome = simulate(controls.numpy(force=True))
    return torch.as_tensor((outcome - goal.numpy(force=True)) ** 2, dtype=torch.float32)


def make_policy() -> nn.Sequential:
    """A network of one hidden layer."""
    return nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CONTROLS))


def goals(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``(N, 10)``, and goals ``(N,)`` that follow from them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(INPUTS, generator=torch.Generator().manual_seed(0))
    x = torch.randn(samples, INPUTS, generator=generator)
    return x, 1.5 * torch.tanh(x @ weights / 3)


def critic_by_hand(policy: nn.Module, x: Tensor, goal: Tensor, steps: int, seed: int) -> None:
    """A critic of two hidden layers of 128 that is told the goal, one update on each batch."""
    critic = nn.Sequential(nn.Linear(CONTROLS + 1, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for inputs, asked in _batches(x, goal, steps, seed):
        controls = policy(inputs)
        tried = controls.detach() + NOISE * torch.randn_like(controls)
        found = costs(tried, asked)
        error = critic(torch.cat([tried, asked.unsqueeze(1)], 1)).squeeze(1) - found
        of_critic.zero_grad()
        error.square().mean().backward()
        of_critic.step()
        optimizer.zero_grad()
        critic(torch.cat([controls, asked.unsqueeze(1)], 1)).mean().backward()
        optimizer.step()


def reinforce_by_hand(policy: nn.Module, x: Tensor, goal: Tensor, steps: int, seed: int) -> None:
    """REINFORCE with the batch's mean as a baseline."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for inputs, asked in _batches(x, goal, steps, seed):
        controls = policy(inputs)
        tried = controls.detach() + NOISE * torch.randn_like(controls)
        found = costs(tried, asked)
        log_probability = -(tried - controls).square().sum(1) / (2 * NOISE**2)
        optimizer.zero_grad()
        ((found - found.mean()) * log_probability).mean().backward()
        optimizer.step()


def _batches(x: Tensor, goal: Tensor, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(x), (steps, BATCH), generator=generator)
    return [(x[each], goal[each]) for each in places]


#: By the name in the tables.
LOOPS: dict[str, Callable[[nn.Module, Tensor, Tensor, int, int], None]] = {
    "critic by hand": critic_by_hand,
    "REINFORCE by hand": reinforce_by_hand,
}

__all__ = ["LOOPS", "costs", "goals", "make_policy", "simulate"]
