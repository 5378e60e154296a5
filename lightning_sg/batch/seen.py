"""The context that a traced step showed: what its loss compared the network with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sg.batch.path import tensors_in
from lightning_sg.batch.program import Program, Value, described, drawn_for, leaves_of
from lightning_sg.rng import StepRandomness


class SeenContext:
    """Takes from each batch what the loss of a traced step was computed from, apart from the network's outputs.

    Args:
        values: What that was; each depends on the batch alone.
        by: The loss in words.

    Attributes:
        names: A name for each value: where in the batch it comes from.
        words: What was found, in words.
        buffers: The names of the buffers that it is computed from.
    """

    def __init__(self, values: Sequence[Value], by: str) -> None:
        self._program = Program(values)
        self.buffers = self._program.buffers
        names = list(map(described, values))
        counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
        self.names = tuple(name if same == 1 else f"{name} ({same})" for name, same in zip(names, counts))
        used = {leaf.node for value in values for leaf in leaves_of(value)}  # not what only earlier draws depend on
        taken = zip(self._program.leaves, self._program.paths)
        paths = list(dict.fromkeys(str(path) for leaf, path in taken if leaf.node in used))
        drawn = dict.fromkeys(filter(None, map(drawn_for, values)))
        if all(value.is_size for value in values):
            self.words = f"the activations alone, by {by}, which takes nothing else of the batch"
        else:
            self.words = f"{', '.join([*paths, *drawn])}, by {by}"

    def of(self, batch: Any, number: int = 0) -> Any:
        """The context: a tensor if it has one entry, otherwise a dict by name.

        Args:
            batch: The batch.
            number: Which training batch it is, by which the step draws random numbers.

        Raises:
            SyntheticGradientsError: If the batch is built otherwise than the traced one.
        """
        if self._program.draws:
            randomness = StepRandomness(_device_of(batch))
            randomness.count(number, training=True)
            with randomness:
                found = self._program.run(batch, begin=randomness.begin)
        else:
            found = self._program.run(batch)
        if len(found) == 1 and isinstance(found[0], Tensor):
            return found[0]
        return dict(zip(self.names, found))

    def __deepcopy__(self, _memo: Any) -> SeenContext:
        return self


def _device_of(batch: Any) -> torch.device:
    """Where the step runs: a CUDA device if anything of the batch is on one."""
    devices = [tensor.device for _path, tensor in tensors_in(batch)]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


__all__ = ["SeenContext"]
