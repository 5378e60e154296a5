"""What the policy for batches that are not finite sees of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_sg.crossings.base import BatchContext
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.finite.diagnosis import BatchOrigin, Scene
from lightning_sg.lightning_api import pl
from lightning_sg.ownership import Ownership
from lightning_sg.partition.trace import Trace
from lightning_sg.replicas import Replicas


class WatchedTraining:
    """The training of one module.

    Attributes:
        module: The module.
        trace: What a traced training step showed, once there was one.
        received: What this process received of the current batch from the stage before, and carries a gradient.

    Args:
        module: The module.
        boundaries: The boundaries between stages.
        ownership: What is this process's.
        batch: The current batch, or ``None``.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        boundaries: Sequence[str],
        ownership: Callable[[], Ownership],
        batch: Callable[[], BatchContext | None],
    ) -> None:
        self.module = module
        self.trace = Trace()
        self.received: Sequence[Tensor] = ()
        self._boundaries = list(boundaries)
        self._ownership = ownership
        self._batch = batch

    @property
    def order(self) -> list[str]:
        """The boundaries between stages, in the order of the data."""
        return self.trace.order or self._boundaries

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.order)

    @property
    def device(self) -> torch.device:
        """Where the stages of this process are."""
        return self.module.trainer.strategy.root_device

    @property
    def has_loss(self) -> bool:
        """Whether the model's own loss is computed in this process."""
        return self._ownership().has_loss

    @property
    def replicas(self) -> Replicas:
        """The processes that hold the same stages in other replicas."""
        return self._ownership().replicas

    @property
    def scaled(self) -> bool:
        """Whether a gradient scaler looks after infinite gradients itself."""
        batch = self._batch()
        return batch is not None and isinstance(batch.scale.factor, Tensor)

    @property
    def number(self) -> int:
        """The number of the current batch."""
        batch = self._batch()
        assert batch is not None
        return batch.number

    def before(self, boundary: str) -> int:
        """The number of the stage before a boundary."""
        return self.order.index(boundary)

    def stage_of(self, name: str) -> int:
        """The first stage that uses the parameter or buffer of that name; the last if none is known to."""
        return min(self.trace.uses.get(name, {self.last}))

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizers train."""
        groups = [group for optimizer in self.module.trainer.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    def scene(self) -> Scene:
        """What is at hand of the current batch, to find out why it is not finite."""
        batch, order, owns = self._batch(), self.order, self._ownership().owns
        received: dict[int, Sequence[Tensor]] = {}
        for crossing in () if batch is None else batch.crossings:
            if isinstance(crossing, LocalCrossing) and crossing.record is not None:
                stage = self.before(crossing.name) + 1
                received[stage] = [*received.get(stage, ()), *crossing.record.activations]
        if self.received:
            received[min((place for place, name in enumerate(order) if owns(name)), default=self.last)] = self.received
        origin = BatchOrigin() if batch is None else batch.origin
        rank, holds = self.module.trainer.global_rank, self._ownership().holds
        return Scene(origin, self.module, self.last, rank, self.trace.uses, holds, received)

    def cause_before(self, boundary: str, *, arrives_finite: bool = True) -> str | None:
        """Why what a predictor makes at a boundary is not finite, in the current batch; ``None`` if that is not known.

        Args:
            boundary: The boundary.
            arrives_finite: Whether what reaches the boundary is finite.
        """
        if self._batch() is None or boundary not in self.order:
            return None
        scene, stage = self.scene(), self.before(boundary)
        cause = scene.cause(stage)
        if cause is None and not arrives_finite:
            cause = (
                "The data, the activations that the stage received and its weights are finite, so what it computes "
                "before the boundary is at fault: look for a logarithm or a division by zero, or an overflow (lower "
                "its learning rate or clip its gradients)."
            )
        return None if cause is None else f"In {scene.origin.words}, {scene.name(stage)}: {cause}"


__all__ = ["WatchedTraining"]
