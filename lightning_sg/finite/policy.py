"""What is done about a loss or a gradient that is not finite: an error by default, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_sg.errors import NonFiniteLossError
from lightning_sg.finite.buffers import BuffersBefore
from lightning_sg.finite.device_flags import DeviceFlags
from lightning_sg.finite.diagnosis import Scene, bad_gradients
from lightning_sg.finite.values import are_finite
from lightning_sg.partition.trace import Trace
from lightning_sg.replicas import Replicas

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

    @property
    def last(self) -> int:
        """The number of the last stage."""

    @property
    def number(self) -> int:
        """The number of the current batch."""

    @property
    def replicas(self) -> Replicas:
        """The processes that hold the same stages in other replicas."""

    def before(self, boundary: str) -> int:
        """The number of the stage before a boundary."""

    def stage_of(self, name: str) -> int:
        """The first stage that uses the parameter or buffer of that name."""

    def scene(self) -> Scene:
        """What is at hand of the current batch."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizers train."""


class IgnoresNonFinite:
    """Does nothing about batches that are not finite; others override what they do."""

    #: How many batches a stage has left out, by its number; ``None`` if none ever is.
    skipped: dict[int, int] | None = None

    def accept(self, trace: Trace) -> None:
        """Takes what a traced step showed."""

    def begin(self) -> None:
        """A training batch begins."""

    def crosses(self, boundary: str, carriers: Sequence[Tensor], context: Any) -> bool:
        """The batch has come to a boundary: whether the stage before leaves it out.

        Args:
            boundary: The boundary.
            carriers: What crosses and carries a gradient.
            context: What the predictor is told of the batch.
        """
        return False

    def receives(self, boundary: str, carriers: Sequence[Tensor]) -> None:
        """A stage was given what crosses a boundary."""

    def skips_loss(self) -> bool:
        """Whether the last stage leaves the batch out."""
        return False

    def withholds(self, boundary: str) -> bool:
        """Whether the stage after a boundary leaves the batch out, so that it has no target to give."""
        return False

    def teaches(self, boundary: str, targets: Sequence[Tensor]) -> bool:
        """Whether these targets are good enough for the stage before a boundary."""
        return True

    def before_backward(self, loss: Tensor) -> None:
        """A backward pass is about to begin, from ``loss``."""

    def leave_out(self) -> None:
        """A backward pass is over; nothing that is due of earlier batches is in the gradients yet."""

    def corrections(self, number: int, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is to be kept of the corrections of batch ``number``, by parameter name."""
        return gradients

    def after_backward(self) -> None:
        """The gradients are complete."""

    def before_step(self) -> None:
        """An optimizer is about to use gradients that :meth:`after_backward` has not seen."""

    def end(self) -> None:
        """The batch is over."""

    def check(self) -> None:
        """A moment at which the device may be asked: before something is logged or saved."""

    def undo(self) -> None:
        """Training ends within a batch, by an error."""


class RaisesNonFinite(IgnoresNonFinite):
    """Raises an error that says where NaN or infinity came from.

    On a CPU it comes before the optimizer step of the batch. Other devices keep a flag, which :meth:`check` looks at.

    Args:
        watched: The training.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._flags = DeviceFlags(watched.scene)
        self._buffers = BuffersBefore(watched.module, floating=True)

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
        gradients = [] if self._watched.scaled else gradients_of(self._watched.parameters())
        if not gradients:
            return
        if gradients[0].device.type != "cpu":
            self._flags.see(gradients=gradients)
        elif not are_finite(gradients):
            raise gradient_error(self._watched.scene())

    def before_step(self) -> None:
        """Looks at the gradients.

        Raises:
            NonFiniteLossError: If one is not finite.
        """
        self.after_backward()

    def check(self) -> None:
        """Asks the device, which stops it for a moment.

        Raises:
            NonFiniteLossError: If there was a loss or a gradient that was not finite.
        """
        self._flags.check()

    def undo(self) -> None:
        """Restores buffers that the batch has broken, so that a checkpoint written after the error is finite."""
        self._buffers.restore(lambda _name, tensor: not are_finite([tensor]))


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that parameters have."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


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
    "OnNonFinite",
    "RaisesNonFinite",
    "Watched",
    "gradient_cause",
    "gradients_of",
    "loss_cause",
]
