"""Random numbers of stages on several processes: equal outside the stages, different inside them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch

_HOST = torch.device("cpu")


class StepRandomness(AbstractContextManager["StepRandomness"]):
    """Gives each step its own random numbers and restores the generators on exit.

    A step starts with the same numbers in every process, so that all stages agree on what the user's code draws before
    the network: noise, a mixup permutation, a mask. Each process draws different numbers from its own stages on, see
    :meth:`diverge`. Outside steps the processes share one state, so they shuffle and augment the data alike, whatever
    dropout draws in each stage. Covers torch, the CUDA device, numpy and ``random``.

    Attributes:
        number: Counts the steps.

    Args:
        position: This process's position among the stage ranks, which selects its numbers.
        device: The stages' device.
    """

    def __init__(self, position: int, device: torch.device) -> None:
        self._position = position
        self._device = device
        self.number = 0
        self._outside: dict[str, Any] = {}

    def __enter__(self) -> StepRandomness:
        self._outside = random_state(self._device)
        self.number += 1
        self._seed(0)
        return self

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Gives the numbers of the newest step once more inside the context."""
        self.number -= 1
        with self:
            yield

    def diverge(self, crossing: int = 0) -> None:
        """Switches to numbers that differ from those of the other processes, and from those of other crossings."""
        self._seed(self._position + 1, crossing)

    def converge(self, crossing: int = 0) -> None:
        """Switches to numbers that are the same in every process: the step has left this process's stages."""
        self._seed(0, crossing + 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_random_state(self._outside, self._device)

    def _seed(self, stream: int, crossing: int = 0) -> None:
        # All processes have this seed: the strategy shares the state at the start.
        shared = self._outside["seed"]
        entropy = [shared % 2**64, self.number, stream, *([crossing] if crossing else [])]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        on_device = _generator_of(self._device)
        if on_device is not None:
            on_device.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


def random_state(device: torch.device = _HOST) -> dict[str, Any]:
    """The states of all generators on the host and, if ``device`` is a CUDA device, of its generator.

    Data loading draws from the former, and augmentations in ``on_after_batch_transfer`` may draw from the latter.
    Reading a state does not synchronize the device.
    """
    on_device = _generator_of(device)
    return {
        "seed": torch.initial_seed(),
        "torch": torch.get_rng_state(),
        "device": None if on_device is None else on_device.get_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device = _HOST) -> None:
    """Restores a :func:`random_state`, which may come from another process and its device."""
    torch.set_rng_state(state["torch"])
    on_device = _generator_of(device)
    if on_device is not None and state["device"] is not None:
        on_device.set_state(state["device"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _generator_of(device: torch.device) -> torch.Generator | None:
    """The default generator of a CUDA device; ``None`` for the host."""
    if device.type != "cuda":
        return None
    torch.cuda.init()  # makes the generators
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Restores the generators on the host on exit."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators inside the context and restores the user's random numbers on exit.

    Sets what else a predictor needs to make its parameters: gradients on, inference mode off, float32 as default.

    Args:
        seed: The seed inside the context.
        device: The device of the predictor's inputs.
    """
    devices = [device] if device.type == "cuda" else []
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)  # Lightning changes it under "bf16-true" and "64-true"
        try:
            yield
        finally:
            torch.set_default_dtype(default)


__all__ = ["StepRandomness", "random_state", "seeded", "set_random_state", "unchanged_randomness"]
