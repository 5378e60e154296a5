"""What is done about a loss or a gradient that is not finite: an error by default, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_sg.errors import NonFiniteLossError
from lightning_sg.finite.buffers import BuffersBefore
from lightning_sg.finite.device_flags import DeviceFlags
from lightning_sg.finite.diagnosis import Scene, bad_gradients
from lightning_sg.finite.values import are_finite

OnNonFinite = Literal["raise", "skip", "ignore"]

_ADVICE = (
    "Or pass SyntheticGradients(on_non_finite='skip') to leave such batches out, or 'ignore' to train on as Lightning "
    "does."
)


class Watched(Protocol):
    """The training that is watched."""

    @property
    def module(self) -> nn.Module:
        """The model."""

    @property
    def device(self) -> torch.device:
        """Where its stages are in this process."""

    @property
    def has_loss(self) -> bool:
        """Whether the model's own loss is computed in this process."""

    @property
    def scaled(self) -> bool:
        """Whether a gradient scaler looks after infinite gradients itself."""

    def scene(self) -> Scene:
        """What is at hand of the current batch."""

    def gradients(self) -> Iterable[Tensor]:
        """The gradients that the optimizers have now."""


class NonFinitePolicy(Protocol):
    """Sees every batch and backward pass of a training."""

    def begin(self) -> None:
        """A training batch begins."""

    def before_backward(self, loss: Tensor) -> None:
        """A backward pass is about to begin, from ``loss``."""

    def after_backward(self) -> None:
        """A backward pass is over, and what is due of earlier batches is in the gradients."""

    def check(self) -> None:
        """A moment at which the device may be asked: before something is logged or saved."""

    def undo(self) -> None:
        """Training ends within a batch, by an error."""


class IgnoresNonFinite:
    """Does nothing."""

    def begin(self) -> None:
        """Does nothing."""

    def before_backward(self, loss: Tensor) -> None:
        """Does nothing."""

    def after_backward(self) -> None:
        """Does nothing."""

    def check(self) -> None:
        """Does nothing."""

    def undo(self) -> None:
        """Does nothing."""


class RaisesNonFinite:
    """Raises an error that says where NaN or infinity came from.

    On a CPU it comes before the optimizer step of the batch. Other devices keep a flag, which :meth:`check` looks at.

    Args:
        watched: The training.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._flags = DeviceFlags(watched.scene)
        self._buffers = BuffersBefore(watched.module)

    def begin(self) -> None:
        """Keeps buffers as they are, such as BatchNorm's running statistics."""
        if self._watched.device.type == "cpu":  # another device learns of the batch when it is too late for them
            self._buffers.keep()

    def before_backward(self, loss: Tensor) -> None:
        """Looks at the loss.

        Raises:
            NonFiniteLossError: If it is not finite.
        """
        if not self._watched.has_loss or not loss.is_floating_point():
            return
        if self._watched.scaled and loss.dtype == torch.float16:
            return  # the scaler's factor may have made it infinite, after which it takes a smaller one
        if loss.device.type != "cpu":
            self._flags.see(loss=[loss])
        elif not math.isfinite(loss.sum().item()):
            raise loss_error(self._watched.scene())

    def after_backward(self) -> None:
        """Looks at the gradients.

        Raises:
            NonFiniteLossError: If one is not finite.
        """
        gradients = [] if self._watched.scaled else list(self._watched.gradients())
        if not gradients:
            return
        if gradients[0].device.type != "cpu":
            self._flags.see(gradients=gradients)
        elif not are_finite(gradients):
            raise gradient_error(self._watched.scene())

    def check(self) -> None:
        """Asks the device, which stops it for a moment.

        Raises:
            NonFiniteLossError: If there was a loss or a gradient that was not finite.
        """
        self._flags.check()

    def undo(self) -> None:
        """Restores buffers that the batch has broken, so that a checkpoint written after the error is finite."""
        self._buffers.restore(lambda _name, tensor: not are_finite([tensor]))


def loss_error(scene: Scene) -> NonFiniteLossError:
    """The error for the loss of the current batch, which is not finite."""
    return NonFiniteLossError(
        f"The loss of {scene.origin.words} is not finite in {scene.name(scene.last)}; no weight was updated with it "
        f"there. {loss_cause(scene)} {_ADVICE}"
    )


def loss_cause(scene: Scene) -> str:
    """What made the loss not finite."""
    return scene.cause(scene.last) or (
        "The data, the activations that the stage received and its weights are finite, so the loss itself is at fault: "
        "look for a logarithm or a division by zero, an overflow in low precision, or logits that have grown too large "
        "(lower the learning rate)."
    )


def gradient_error(scene: Scene) -> NonFiniteLossError:
    """The error for gradients of the current batch that are not finite."""
    stage, listed = bad_gradients(scene) or (scene.last, "of no named parameter")
    return NonFiniteLossError(
        f"Gradients of {scene.origin.words} are not finite in {scene.name(stage)}: {listed}; no weight was updated "
        f"with them. {gradient_cause(scene, stage)} {_ADVICE}"
    )


def gradient_cause(scene: Scene, stage: int) -> str:
    """What made gradients of a stage not finite."""
    return scene.cause(stage) or (
        "The data, the activations that the stage received and its weights are finite, so its backward pass is at "
        "fault: look for the square root or the norm of zero, a division by a tiny number, or an overflow (lower the "
        "learning rate or clip gradients). torch.autograd.set_detect_anomaly(True) names the operation."
    )


__all__ = [
    "IgnoresNonFinite",
    "NonFinitePolicy",
    "OnNonFinite",
    "RaisesNonFinite",
    "Watched",
    "gradient_cause",
    "loss_cause",
]
