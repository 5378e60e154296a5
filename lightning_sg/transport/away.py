"""What a stage may do while its neighbour is away for a while."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sg.arguments import MOST_BATCHES, MOST_SECONDS, check_fields, number, whole


@dataclass(frozen=True)
class Away:
    """How long a stage goes on by itself while a neighbour is silent: stopped, or behind a link that is down.

    A stage whose next stage is silent goes on with predicted gradients, and with :class:`~lightning_sg.SyntheticInputs`
    a stage whose previous stage is silent goes on with predicted activations. What it sends meanwhile is kept, and the
    neighbour catches up in order once it is back. A stage without predictions, and whatever all stages do together,
    such as saving a checkpoint, waits. A connection that breaks is made again.

    While it lasts, the run is not what one process would compute: predictors get no targets. Their loss grows with the
    number of such batches, so keep ``batches`` small; tens are harmless, thousands are not.

    Args:
        batches: How many batches a stage trains without an answer before it waits.
        seconds: For how long. After these, the stage waits, and the timeout of the strategy runs.
        patience: After how many seconds without a sign of life a neighbour counts as silent.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If a number is out of range.
    """

    batches: int = 50
    seconds: float = 120.0
    patience: float = 2.0

    def __post_init__(self) -> None:
        seconds = number(above=0, most=MOST_SECONDS)
        check_fields("Away", self, batches=whole(1, MOST_BATCHES), seconds=seconds, patience=seconds)


__all__ = ["Away"]
