"""The context that a traced step showed: what its loss compared the network with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sg.batch.program import Program, Value, described


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
        paths = list(dict.fromkeys(str(path) for path in self._program.paths))
        self.words = f"{', '.join(paths)}, by {by}"

    def of(self, batch: Any) -> Any:
        """The context: a tensor if it has one entry, otherwise a dict by name.

        Raises:
            SyntheticGradientsError: If the batch is built otherwise than the traced one.
        """
        found = self._program.run(batch)
        if len(found) == 1 and isinstance(found[0], Tensor):
            return found[0]
        return dict(zip(self.names, found))

    def __deepcopy__(self, _memo: Any) -> SeenContext:
        return self


__all__ = ["SeenContext"]
