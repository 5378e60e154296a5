"""One batch of validation, test or prediction on the stages of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_sg.distributed.mismatch import other_count
from lightning_sg.distributed.program import StageProgram
from lightning_sg.distributed.stage import Stage
from lightning_sg.errors import PartitionError
from lightning_sg.partition.fakes import fake_like, is_fake
from lightning_sg.transport import Activations

# How many batches of validation, test or prediction a stage may be ahead of the next.
MAX_BATCHES_IN_EVALUATION = 2


# How many parameters an error names.
_NAMED = 3


class StageEnds(BaseException):
    """Leaves the user's step at the end of this process's stages; no ``except Exception`` of theirs stops it."""


class WithoutDataError(PartitionError):
    """A tensor that is to be sent or learned from has no data here.

    Args:
        what: The tensor, in words.
        names: The parameters of other processes that it was computed from, each with who holds it, if that is known.
    """

    def __init__(self, what: str, names: Mapping[str, str] = MappingProxyType({})) -> None:
        self.what = what
        self.names = names
        if not names:
            super().__init__(
                f"{what} depends on a parameter or activation of another stage, which has no data here. Compute it "
                "from this stage's own tensors, or pass it through the boundary."
            )
            return
        parts = [f"'{name}', which {holder} trains" for name, holder in list(names.items())[:_NAMED]]
        super().__init__(
            f"{what} depends on parameter {' and on '.join(parts)}, so it has no data here. A parameter trains in the "
            "process that used it first: use it in that stage only, move the boundary so that all its uses are on one "
            "side, or give each stage its own."
        )


class EvaluationPass:
    """A batch of validation, test or prediction: receives activations, and sends them on.

    Its step runs the network as often as it likes. It ends with the last crossing that has been foreseen; where none
    has, the code behind this process's stages runs on without data, to show whether it comes back to them.

    Attributes:
        result: What the step's result is where it ends before the loss.
        beyond: Whether the step is outside this process's stages, so that what it computes now may have no data here.

    Args:
        stage: This process.
        program: How it runs a step.
        fingerprint: Of the batch.
        most: For each boundary, how often the step may cross it; ``None`` if that is not known.
    """

    result: Tensor | None = None

    def __init__(
        self, stage: Stage, program: StageProgram, fingerprint: int, most: Mapping[str, int] | None = None
    ) -> None:
        self._stage = stage
        self._program = program
        self._number = stage.status.number
        self._fingerprint = fingerprint
        self._most = most
        self._received = 0  # how often its inner boundary has been crossed
        self._handed_over = 0  # and its outer boundary
        self._replied = False
        self.beyond = self.several or self._nowhere  # before it comes to them, if it does at all

    @property
    def _nowhere(self) -> bool:
        """Whether the step runs no stage."""
        return self._most is not None and not any(self._most.values())

    @property
    def elsewhere(self) -> bool:
        """Whether the code that runs now only shows if the step comes back: what it computes, others compute."""
        return self.beyond and (self._handed_over > 0 or self._nowhere)

    @property
    def several(self) -> bool:
        """Whether the step may run the network several times."""
        return self._most is None or max(self._most.values(), default=0) > 1

    @property
    def begun(self) -> bool:
        """Whether the step has come to this process's stages."""
        return self._received > 0

    def receive(self, fakes: list[Tensor]) -> list[Tensor]:
        """The start of this process's stages: takes the activations in the place of tensors without data."""
        crossing = self._begin_stages()
        shapes = [tuple(fake.shape) for fake in fakes]
        return list(self._program.inlet.take(self._number, self._fingerprint, shapes, crossing).tensors)

    def hand_over(self, tensors: list[Tensor]) -> list[Tensor]:
        """The end of this process's stages: sends the activations on, and leaves the step."""
        self._check_data(tensors)
        self._program.outlet.send(self._message(tensors))
        return self._leave(tensors)

    def _leave(self, tensors: list[Tensor]) -> list[Tensor]:
        """Leaves the user's step, or goes on in it without data if it may come back."""
        self._handed_over += 1
        inlet, outlet = self._program.inlet.boundary, self._program.outlet.boundary
        if not (self._may_go_on(inlet, self._received) or self._may_go_on(outlet, self._handed_over)):
            raise StageEnds
        self.beyond = True
        return [fake_like(tensor) for tensor in tensors]

    def end_forward(self, why: str = "") -> None:
        """The user's step has come to its end in this process.

        Args:
            why: What ended it, if it did not end as it does everywhere.
        """
        outlet = self._program.outlet
        if self._handed_over and self._may_go_on(outlet.boundary, self._handed_over):
            outlet.send(self._message((), ended=why or "its step has ended"))
        self._bound_lead()

    def _await_end(self) -> None:
        """Hears that the stage before has ended its step after as many crossings, if it says so."""
        inlet = self._program.inlet
        if self._received and self._may_go_on(inlet.boundary, self._received):
            inlet.await_end(self._number, self._received)

    def _may_go_on(self, boundary: str | None, crossings: int) -> bool:
        """Whether a step that has crossed a boundary so often may cross it again, as far as others know."""
        return self._most is None or crossings < self._most.get(str(boundary), 0)

    def _bound_lead(self) -> None:
        """Waits for answers to earlier batches, so that this process is not too far ahead."""
        if self._handed_over:
            self._program.outlet.await_answers(self._number, MAX_BATCHES_IN_EVALUATION)

    def _check_data(self, tensors: Sequence[Tensor]) -> None:
        """Refuses to hand on what was computed from a parameter or activation that this process does not have.

        Raises:
            WithoutDataError: If a tensor has no data.
        """
        fake = next((tensor for tensor in tensors if is_fake(tensor)), None)
        if fake is not None:
            again = f", which has been crossed {self._handed_over} times before," if self._handed_over else ""
            raise WithoutDataError(
                f"{self._stage.status.name}: a tensor of shape {tuple(fake.shape)} that reaches boundary "
                f"'{self._program.outlet.boundary}'{again} in {self._stage.status.doing}"
            )

    def finish_step(self) -> None:
        """The step is over: answers the stage before."""
        self._program.first_uses.look()
        if self._received and not self._replied:
            self._program.inlet.reply(self._number, [()] * self._received)
            self._await_end()

    def skip(self) -> None:
        """There are no activations: nobody before waits for an answer, and the stage after has none either."""
        self._replied = True
        if self._program.outlet.boundary is not None:
            self._program.outlet.send(self._message((), skipped=True))

    def _begin_stages(self) -> int:
        """The step has come to this process's stages; returns how often it had before."""
        crossing = self._received
        self._check_foreseen(crossing)
        self._received, self.beyond = crossing + 1, False
        self._program.first_uses.begin()
        self._program.fakes.begin_stages()
        self._stage.own_stages_begin(crossing)
        return crossing

    def _check_foreseen(self, crossing: int) -> None:
        """Refuses to wait for activations that the stage before cannot send, as it has left the step.

        Raises:
            BoundaryError: If so.
        """
        inlet = self._program.inlet
        if crossing and not self._may_go_on(inlet.boundary, crossing):
            why = "the step has ended, as such steps were not seen to cross it more often"
            raise other_count(self._stage.status, inlet.neighbour, str(inlet.boundary), crossing, why)

    def _message(self, tensors: Sequence[Tensor], **what: Any) -> Activations:
        status = self._stage.status
        return Activations(
            self._number,
            status.doing,
            tensors,
            crossing=self._handed_over,
            fingerprint=self._fingerprint,
            batches=status.places[self._number].batches,
            last=status.places[self._number].last,
            ends=self._stage.stopping.ends,
            owners=self._program.first_uses.owners,
            **what,
        )


__all__ = ["EvaluationPass", "StageEnds", "WithoutDataError"]
