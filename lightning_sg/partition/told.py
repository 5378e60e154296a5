"""What predictors are told of each batch besides activations: by the user's choice, or by the loss of a traced step."""

from __future__ import annotations

from typing import Any

from lightning_sg.batch.context import ContextSource, context_of, detached
from lightning_sg.batch.seen import SeenContext
from lightning_sg.partition.loss_inputs import LossInputs
from lightning_sg.partition.trace import Trace
from lightning_sg.predictors.base import LossInfo


class Told:
    """The context of each batch, and the loss that goes with it.

    Args:
        source: What the user chose. ``"auto"``: what the loss of the traced step compares the network with. Where no
            step could be followed, that is guessed from the structure of the batch.
        trace: A traced step; ``None`` before there is one, when there is no context yet.
    """

    def __init__(self, source: ContextSource, trace: Trace | None) -> None:
        self._source = source
        self._trace = trace
        self._seen: SeenContext | None = None
        if source == "auto" and trace is not None:
            self._seen = trace.inputs.context

    @property
    def guesses(self) -> bool:
        """Whether the context is guessed from the structure of the batch."""
        trace = self._trace
        return self._source == "auto" and trace is not None and not trace.order and trace.inputs == LossInputs()

    def of(self, batch: Any, number: int = 0) -> Any:
        """The context of a batch, detached; ``None`` if there is none.

        Args:
            batch: The batch.
            number: Which training batch it is.

        Raises:
            SyntheticGradientsError: If the batch has no such entry.
        """
        if self._source != "auto" or self.guesses:
            return context_of(batch, self._source)
        return None if self._seen is None else detached(self._seen.of(batch, number))

    @property
    def loss(self) -> LossInfo | None:
        """The model's loss, as far as it is known."""
        if self._trace is None:
            return None
        if self._source == "auto" and self._seen is not None:
            return self._trace.inputs.loss
        return self._trace.loss

    @property
    def missing(self) -> str | None:
        """Why there is nothing to tell, if there should be something."""
        if self._source != "auto" or self._trace is None or self._seen is not None or self.guesses:
            return None
        return self._trace.inputs.reason

    @property
    def words(self) -> str | None:
        """What was found, in words; ``None`` if nothing was, or the user chose."""
        return None if self._seen is None else self._seen.words


__all__ = ["Told"]
