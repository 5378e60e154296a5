"""Every error this package raises on purpose, so that users can catch one family."""

from __future__ import annotations

from collections.abc import Sequence


class SyntheticGradientsError(RuntimeError):
    """Base class of the errors that lightning_sg raises on purpose.

    Tracebacks end with a note that names the command which explains the error.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        for kind in type(self).__mro__:
            if kind.__module__ == __name__ and kind not in _UNEXPLAINED:
                self.add_note(f"More about its causes: lightning-sg explain {kind.__name__}")
                return


class BoundaryError(SyntheticGradientsError):
    """A boundary is unknown, was not reached, was reached twice, or does not cut the network."""


class RepeatedBoundaryError(BoundaryError, ValueError):
    """The argument ``boundaries`` has a name twice."""


class PartitionError(SyntheticGradientsError):
    """The stages between the boundaries cannot be placed on the processes.

    Attributes:
        reached: The boundaries up to which the step could be followed, if that is what failed.
        why: What it failed at.

    Args:
        message: The whole message.
        reached: See above.
        why: See above.
    """

    def __init__(self, message: str, reached: Sequence[str] = (), why: str = "") -> None:
        super().__init__(message)
        self.reached = list(reached)
        self.why = why


class BatchMismatchError(SyntheticGradientsError):
    """Two stages were given different batches."""


class CheckpointError(SyntheticGradientsError):
    """A checkpoint is damaged, or has something in it that could run code."""


class NonFiniteLossError(SyntheticGradientsError):
    """A loss or a gradient of a training batch is NaN or infinite."""


class NonFinitePredictionError(NonFiniteLossError):
    """A predictor returned NaN or infinity."""


class StageLostError(SyntheticGradientsError):
    """Another stage died, failed or stayed silent for longer than the timeout.

    Attributes:
        reason: What happened to it, without what this process was waiting for: what the stages beyond are told.

    Args:
        message: The whole message.
        reason: See above; by default the message.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


#: Those that are not public: the note is about the class that they are derived from.
_UNEXPLAINED = (RepeatedBoundaryError,)
