"""How a stage comes by its activations: it waits for them, or goes on with predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_sg.distributed.inlet import Inlet
from lightning_sg.errors import BoundaryError
from lightning_sg.inputs.crossing import refuse_several
from lightning_sg.inputs.record import InputRecord
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.session import Session
from lightning_sg.transport import Activations

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Arrived:
    """What a stage goes on with.

    Attributes:
        tensors: The activations, or predictions in their place.
        carries: For each, whether a gradient is to be sent back.
        wants_target: Whether the stage before asks for the target.
        coupled: Whether it waits for it and uses it.
    """

    tensors: Sequence[Tensor]
    carries: Sequence[bool]
    wants_target: bool
    coupled: bool = False


class Arrivals(Protocol):
    """Brings the activations of a training batch."""

    def arrive(self, number: int, fingerprint: int, fakes: Sequence[Tensor], crossing: int = 0) -> Arrived:
        """Brings what the stage goes on with.

        Args:
            number: The number of the batch.
            fingerprint: Of the batch as this process was given it.
            fakes: Tensors without data, of the form of the activations.
            crossing: How often the batch has crossed the boundary before.
        """


class TrueActivations:
    """Waits for the activations.

    Args:
        inlet: The connection to the stage before.
    """

    def __init__(self, inlet: Inlet) -> None:
        self._inlet = inlet

    def arrive(self, number: int, fingerprint: int, fakes: Sequence[Tensor], crossing: int = 0) -> Arrived:
        """See :meth:`Arrivals.arrive`."""
        message = self._inlet.take(number, fingerprint, _shapes(fakes), crossing)
        carries = [spec.requires_grad for spec in message.specs]
        return Arrived(message.tensors, carries, message.wants_target, message.coupled)


class PredictedActivations:
    """Goes on with predicted activations; the true ones are waited for when they are due to be learned from.

    Args:
        inlet: The connection to the stage before.
        trainer: The input predictor, whose source of true activations this is.
        session: Knows the current batch.
    """

    def __init__(self, inlet: Inlet, trainer: InputTrainer, session: Session) -> None:
        self._inlet = inlet
        self._trainer = trainer
        self._session = session
        self._expected: dict[int, tuple[int, int, Shapes]] = {}  # by step: number, fingerprint and shapes
        trainer.source = self

    def arrive(self, number: int, fingerprint: int, fakes: Sequence[Tensor], crossing: int = 0) -> Arrived:
        """See :meth:`Arrivals.arrive`."""
        refuse_several(self._trainer.name, crossing)
        batch = self._session.current
        assert batch.features is not None
        learns = self._session.updates.after(self._trainer.name)
        self._trainer.learn_due()
        if not self._trainer.waits:
            self._expected[self._trainer.step] = (number, fingerprint, _shapes(fakes))
            predicted = self._trainer.cross(batch.features, fakes, learns=learns, at_hand=False)
            assert predicted is not None
            # Whether the stage before does want the target is in a message that is not waited for.
            return Arrived(predicted, [True] * len(predicted), wants_target=True)
        message = self._checked(self._inlet.take(number, fingerprint, _shapes(fakes)))
        # A predictor that goes on from a checkpoint may learn for the first time from what was saved with it.
        predicted = self._trainer.cross(batch.features, message.tensors, learns=learns)
        carries = [spec.requires_grad for spec in message.specs]
        return Arrived(predicted or message.tensors, carries, message.wants_target, message.coupled)

    def activations(self, record: InputRecord) -> None:
        """See :meth:`ActivationSource.activations`."""
        expected = self._expected.pop(record.step, None)
        message = None if expected is None else self._inlet.take_late(*expected)
        if message is not None:
            record.take(self._checked(message).tensors)

    def _checked(self, message: Activations) -> Activations:
        """Refuses activations that could not be predicted."""
        fixed = [spec.shape for spec in message.specs if not spec.requires_grad]
        if fixed:
            raise BoundaryError(
                f"A tensor of shape {fixed[0]} that carries no gradient crosses boundary '{self._trainer.name}', "
                "between two processes. With SyntheticGradients(inputs=...) the stage after it does not wait for the "
                "one before, and only activations that carry a gradient are predicted. Make it from the batch in the "
                "stage that uses it (every stage has the batch), or train these stages in one process."
            )
        return message


def _shapes(tensors: Sequence[Tensor]) -> Shapes:
    return [tuple(tensor.shape) for tensor in tensors]


__all__ = ["Arrivals", "Arrived", "PredictedActivations", "TrueActivations"]
