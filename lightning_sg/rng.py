"""Random numbers of stages: each stage has its own, and processes share those outside."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch

_HOST = torch.device("cpu")


def seed_for(seed: int, name: str) -> int:
    """The seed of what belongs to one boundary: the run's, changed by a name."""
    return seed ^ zlib.crc32(name.encode())


class StepRandomness(AbstractContextManager["StepRandomness"]):
    """Gives each step, and each stage in it, random numbers of its own; restores the generators on exit.

    Every stage has the same numbers wherever it runs: in one process with all others, or in a process of its own. A
    step begins with those of the first stage, in every process, so that all stages agree on what the user's code draws
    before the network: noise, a mixup permutation, a mask. Outside steps the processes share one state, so they shuffle
    and augment the data alike, whatever is drawn in each stage. Covers torch, the CUDA device, numpy and ``random``.

    The numbers depend on the seed outside and on the step: how many training batches there were, and how many steps of
    evaluation since. So a resumed run draws what the whole run would.

    Args:
        device: The stages' device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._step = (0, 0)
        self._stage = 0
        self._outside: dict[str, Any] = {}

    def count(self, batches: int, *, training: bool) -> None:
        """Another step comes.

        Args:
            batches: How many training batches there were.
            training: Whether it is a training step.
        """
        before, evaluations = self._step
        self._step = (batches, 0 if training else 1 if before != batches else evaluations + 1)

    def __enter__(self) -> StepRandomness:
        self._outside = random_state(self._device)
        self._stage = 0
        self._seed()
        return self

    def next_stage(self) -> None:
        """The step has come to the next stage."""
        self.begin(self._stage + 1)

    def begin(self, stage: int) -> None:
        """The step begins a stage, the first of which is 0; a network that runs again has stages of other numbers."""
        self._stage = stage
        self._seed()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_random_state(self._outside, self._device)

    def _seed(self) -> None:
        # All processes have this seed: the strategy shares the state at the start.
        shared = self._outside["seed"] % 2**64
        place = struct.pack("<4Q", shared, *self._step, self._stage)
        seed = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest())  # ten times as fast as a SeedSequence
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


__all__ = ["StepRandomness", "random_state", "seed_for", "seeded", "set_random_state", "unchanged_randomness"]
