"""What a stage may do while its neighbour is away for a while."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lightning_sg.arguments import MOST_BATCHES, MOST_SECONDS, check_fields, number, optional, path, whole


@dataclass(frozen=True)
class Away:
    """How long a stage goes on by itself while a neighbour is silent: stopped, or behind a link that is down.

    A stage whose next stage is silent goes on with predicted gradients, and with :class:`~lightning_sg.SyntheticInputs`
    a stage whose previous stage is silent goes on with predicted activations. What it sends meanwhile is kept, and the
    neighbour catches up in order once it is back. A stage without predictions, and whatever all stages do together,
    such as saving a checkpoint, waits. A connection that breaks is made again.

    With ``folder``, a process that was killed can be started again, by the same command and with the same environment
    variables, while the others go on: it restores the snapshot of its own stages and goes forward to the batch that
    its neighbours are at. Rank 0 cannot be replaced, as the others find each other through it. torchrun ends all
    processes when one ends; use a supervisor that restarts one alone, or ``start_method="popen"``, which does.

    While it lasts, the run is not what one process would compute: predictors get no targets. Their loss grows with the
    number of such batches, so keep ``batches`` small; tens are harmless, thousands are not.

    Args:
        batches: How many batches a stage trains without an answer before it waits.
        seconds: For how long. After these, the stage waits, and the timeout of the strategy runs.
        patience: After how many seconds without a sign of life a neighbour counts as silent.
        folder: Where processes other than rank 0 write snapshots of their own stages, for a new process in their place.
            ``None`` for none: then a neighbour that was killed is lost.
        every: After how many batches a snapshot is written.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range.
    """

    batches: int = 50
    seconds: float = 120.0
    patience: float = 2.0
    folder: str | os.PathLike[str] | None = None
    every: int = 100

    def __post_init__(self) -> None:
        seconds = number(above=0, most=MOST_SECONDS)
        whole_number = whole(1, MOST_BATCHES)
        check_fields("Away", self, batches=whole_number, seconds=seconds, patience=seconds)
        check_fields("Away", self, folder=optional(path()), every=whole_number)


__all__ = ["Away"]
