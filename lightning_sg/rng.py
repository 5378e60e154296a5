"""Random numbers of stages on several processes: shared outside the step, each stage's own inside it."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor


class StepRandomness(AbstractContextManager["StepRandomness"]):
    """While entered, torch's CPU generator is this process's own; outside it is as if nothing had been drawn.

    So the processes, once they share a state, go on to draw the same order and the same augmentations of the data,
    whatever dropout draws in each stage.

    Args:
        position: This process's place in the chain; different places draw different numbers.
    """

    def __init__(self, position: int) -> None:
        self._position = position
        self._own: Tensor | None = None
        self._outside: Tensor | None = None

    def __enter__(self) -> StepRandomness:
        self._outside = torch.get_rng_state()
        if self._own is None:
            seed = (torch.initial_seed() + 7919 * (self._position + 1)) % 2**63
            self._own = torch.Generator().manual_seed(seed).get_state()
        torch.set_rng_state(self._own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outside is not None
        self._own = torch.get_rng_state()
        torch.set_rng_state(self._outside)


def random_state() -> dict[str, Any]:
    """The states of all generators that data loading draws from."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores :func:`random_state`, possibly that of another process."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


__all__ = ["StepRandomness", "random_state", "set_random_state"]
