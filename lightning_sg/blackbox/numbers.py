"""Random numbers of a scored boundary, which depend on the batch and on nothing that is drawn elsewhere."""

from __future__ import annotations

import zlib

import numpy as np
import torch


class Numbers:
    """Makes generators by training batch and purpose; a resumed run draws what the whole one would have drawn.

    Args:
        seed: The boundary's.
        replica: The index of the replica, each of which explores differently.
    """

    def __init__(self, seed: int, replica: int) -> None:
        self._seed = seed
        self._replica = replica

    def of(self, batch: int, purpose: str, visit: int, device: torch.device) -> torch.Generator:
        """A generator.

        Args:
            batch: The number of the training batch.
            purpose: What the numbers are for.
            visit: Which call of the boundary in the batch they are for.
            device: Where they are drawn.
        """
        words = [self._seed, batch, zlib.crc32(purpose.encode()), visit, self._replica]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        return torch.Generator(device).manual_seed(seed)


__all__ = ["Numbers"]
