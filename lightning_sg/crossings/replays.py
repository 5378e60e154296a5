"""The batches whose stages are to run once more, and when each does."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_sg.batch.copying import copy_of
from lightning_sg.crossings.base import BatchContext
from lightning_sg.crossings.policy import ExactPolicy, Holds
from lightning_sg.crossings.replay import Hold, Replay, ReplayedBatch, Rerun, cannot_rerun
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.options import LateGradients
from lightning_sg.partition.quiet import quiet
from lightning_sg.partition.replaced import Held, ReplacedTensors
from lightning_sg.training.record import Applied


class Replays:
    """Has stages run old batches again when their true gradients are due.

    A stage keeps what it was given of a batch and the batch, but no graph. When the true gradient of what it handed on
    has come, it runs the batch again with its newest weights. Both the gradients of its parameters and what it tells
    the stage before come from that pass. Source: Huo et al. 2018, *Training Neural Networks Using Features Replay*
    (arXiv 1807.04511).

    What is under way when a checkpoint is written is done at once.

    Attributes:
        rerun: Runs the user's step again.

    Args:
        module: The model.
        policy: Says when, and to which parameters.
    """

    def __init__(self, module: pl.LightningModule, policy: ExactPolicy) -> None:
        self.rerun: Rerun = cannot_rerun
        self._module = module
        self._policy = policy
        self._under_way: list[ReplayedBatch] = []

    def refuse(self, late: LateGradients | None) -> None:
        """Refuses steps that cannot run again.

        Raises:
            SyntheticGradientsError: For manual optimization.
        """
        if late is not None and late.recompute and not self._module.automatic_optimization:
            raise SyntheticGradientsError(
                "LateGradients(recompute=True) runs a step again, and with manual optimization that would update the "
                "weights. Use recompute=False."
            )

    def begin(self, batch: BatchContext) -> None:
        """A batch begins, or its plan is decided again."""
        if batch.plan.applies is Applied.RECOMPUTED and batch.replayed is None:
            origin = batch.origin
            modes = [child.training for child in self._module.modules()]
            batch.replayed = ReplayedBatch(batch.number, origin.index, copy_of(origin.data), batch.scale, modes)

    def end(self, batch: BatchContext) -> None:
        """A batch is over."""
        if batch.replayed is not None and batch.replayed.records:
            self._under_way.append(batch.replayed)

    def run(self, now: int | None, holds: Holds, hold: Hold) -> None:
        """Runs what is due before batch ``now`` is applied, or everything.

        Args:
            now: The number of the batch; ``None`` for everything, from the last stage to the first.
            holds: Whether this process trains the parameter of that name.
            hold: Keeps the gradients until they are due.
        """
        for batch in self._under_way:
            for boundary in self._policy.from_the_end(batch.records):
                if now is None or batch.number + self._policy.delay(boundary) <= now:
                    self._run(batch, boundary, holds, hold)
        self._under_way = [batch for batch in self._under_way if batch.records]

    def forget(self) -> None:
        """Nothing is under way any more."""
        self._under_way = []

    def _run(self, batch: ReplayedBatch, boundary: str, holds: Holds, hold: Hold) -> None:
        record, trainer = batch.records[boundary], self._policy.trainer(boundary)
        exact = record.targets if trainer.distance == 1 else record.exact_targets
        replay = Replay(batch, self.rerun, self._policy.neighbour(boundary, -1), boundary)
        # Not restored but replaced: the graph of the batch that is going on may have buffers in it.
        with quiet(self._module), ReplacedTensors(self._module, _copy_of, _is_buffer):
            gradients = replay.backward(exact, self._policy.of_stage(boundary, holds))
        hold(batch.number, gradients)


def _copy_of(buffer: Tensor) -> Tensor:
    return buffer.detach().clone()


def _is_buffer(held: Held) -> bool:
    return not isinstance(held.tensor, nn.Parameter)


__all__ = ["Replays"]
