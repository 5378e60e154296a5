"""Random numbers of stages on several processes: shared outside their stages, each one's own inside them."""

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
    """While entered, random numbers are those of the step; outside it is as if none had been drawn.

    A step begins with the same numbers in every process, so that what the user's code draws before the network (noise,
    a mixup permutation, a mask) is the same for all stages. At its own stages each process goes on with numbers of its
    own (:meth:`diverge`). Outside, the processes share a state, and so draw the same order and augmentations of the
    data, whatever dropout draws in each stage. Covers torch, the CUDA device, numpy and ``random``.

    Args:
        position: This process's place in the chain; different places draw different numbers.
        device: The stages' device.
    """

    def __init__(self, position: int, device: torch.device) -> None:
        self._position = position
        self._device = device
        self._number = 0
        self._outside: dict[str, Any] = {}

    def __enter__(self) -> StepRandomness:
        self._outside = random_state(self._device)
        self._number += 1
        self._seed(0)
        return self

    def diverge(self) -> None:
        """From here on this process's numbers are its own."""
        self._seed(self._position + 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_random_state(self._outside, self._device)

    def _seed(self, stream: int) -> None:
        # The outside generator's seed is the same everywhere: the strategy shares its state at the start.
        shared = self._outside["seed"]
        seed = int(np.random.SeedSequence([shared % 2**64, self._number, stream]).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        on_device = _generator_of(self._device)
        if on_device is not None:
            on_device.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


def random_state(device: torch.device = _HOST) -> dict[str, Any]:
    """The states of all generators on the host, which data loading draws from, and of a CUDA device's.

    Augmentations on the device draw from the latter, in ``on_after_batch_transfer``. Reading it does not stop it.
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
    """Restores :func:`random_state`, possibly that of another process and its device."""
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
    torch.cuda.init()  # there are no generators before
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Afterwards the generators on the host are as if nothing had been drawn."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While entered, a predictor can make its parameters, without touching the user's random numbers.

    Args:
        seed: That of the numbers drawn meanwhile.
        device: That of the predictor's inputs.
    """
    devices = [device] if device.type == "cuda" else []
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)  # under "bf16-true" and "64-true" Lightning changes it
        try:
            yield
        finally:
            torch.set_default_dtype(default)


__all__ = ["StepRandomness", "random_state", "seeded", "set_random_state", "unchanged_randomness"]
