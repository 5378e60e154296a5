"""Notes on a device which batch was the first that was not finite, without stopping the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_sg.errors import NonFiniteLossError
from lightning_sg.finite.diagnosis import BatchOrigin, Scene
from lightning_sg.finite.values import are_finite_on_device, named_tensors

_LOSS, _GRADIENTS, _DATA = range(3)
_NOBODY = 2**62


class DeviceFlags:
    """The first batches whose loss, gradients and data were not finite, as numbers on the device.

    Args:
        scene: What is at hand of the current batch.
    """

    def __init__(self, scene: Callable[[], Scene]) -> None:
        self._scene = scene
        self._origins: list[BatchOrigin] = []
        self._first: Tensor | None = None
        self._error: NonFiniteLossError | None = None

    def see(self, loss: Sequence[Tensor] = (), gradients: Sequence[Tensor] = ()) -> None:
        """Looks at a loss or at gradients of the current batch."""
        kind, device = (_LOSS, loss[0].device) if loss else (_GRADIENTS, gradients[0].device)
        if self._first is None:
            self._first = torch.full((3,), _NOBODY, device=device)
        origin = self._scene().origin
        if not self._origins or (self._origins[-1].epoch, self._origins[-1].index) != (origin.epoch, origin.index):
            self._origins.append(BatchOrigin(origin.epoch, origin.index))
            self._note(_DATA, _floating(origin, device))
        self._note(kind, [*loss, *gradients])

    def _note(self, kind: int, tensors: Sequence[Tensor]) -> None:
        if tensors:
            assert self._first is not None
            number = len(self._origins) - 1
            found = torch.where(are_finite_on_device(tensors), _NOBODY, number)
            self._first[kind] = torch.minimum(self._first[kind], found.to(self._first))

    def check(self) -> None:
        """Asks the device.

        Raises:
            NonFiniteLossError: If a batch was not finite; from then on every time, so that no checkpoint is written.
        """
        if self._error is not None:
            raise self._error
        if self._first is None:
            return
        first: list[int] = self._first.tolist()
        origins, self._origins, self._first = self._origins, [], None
        if min(first[_LOSS], first[_GRADIENTS]) == _NOBODY:
            return
        self._error = self._late(first, origins)
        raise self._error

    def _late(self, first: list[int], origins: list[BatchOrigin]) -> NonFiniteLossError:
        number, scene = min(first[_LOSS], first[_GRADIENTS]), self._scene()
        what = "The loss" if first[_LOSS] == number else "A gradient"
        cause = (
            "The data of this batch are at fault: they have NaN or infinity in them. Clean or drop such samples."
            if first[_DATA] == number
            else "The data of this batch are finite: the weights were broken by a step before, or the loss itself is "
            "at fault (a logarithm or a division by zero, an overflow, a learning rate too high)."
        )
        return NonFiniteLossError(
            f"{what} of {origins[number].words} is not finite in the process of rank {scene.rank} (stages up to "
            f"{scene.last}). {cause} It was noticed only now, as a device is asked at logging steps, so the weights "
            "are broken: go on from an earlier checkpoint. No other is written. "
            "SyntheticGradients(on_non_finite='skip') leaves such batches out."
        )


def _floating(origin: BatchOrigin, device: torch.device) -> list[Tensor]:
    tensors = [tensor for _path, tensor in named_tensors(origin.data)]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.device == device]


__all__ = ["DeviceFlags"]
