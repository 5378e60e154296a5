"""One training batch on the stages of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sg.boundary import differentiable
from lightning_sg.crossings.inject import blocked, inject
from lightning_sg.crossings.kept_graph import KeptGraph
from lightning_sg.distributed.arrivals import Arrivals
from lightning_sg.distributed.inlet import Inlet, Residuals
from lightning_sg.distributed.outlet import Sent
from lightning_sg.distributed.program import StageProgram
from lightning_sg.distributed.stage import Stage
from lightning_sg.distributed.stage_pass import EvaluationPass, WithoutDataError
from lightning_sg.errors import BoundaryError
from lightning_sg.partition.fakes import fake_like, is_fake
from lightning_sg.predictors.base import Gradients
from lightning_sg.training.record import Record


@dataclass
class Received:
    """What has come in at one crossing of this process's inner boundary.

    Attributes:
        leaves: Of the activations, those that carry a gradient.
        wants_target: Whether the stage before asks for the target.
        coupled: Whether it waits for it and uses it.
        sent: For each leaf, the gradient of the mean loss that has been sent; ``None`` before any has.
    """

    leaves: list[Tensor] = field(default_factory=list)
    wants_target: bool = False
    coupled: bool = False
    sent: list[Tensor] | None = None


@dataclass
class HandedOver:
    """What has gone out at one crossing of this process's outer boundary, and still has to go backward.

    Attributes:
        record: The crossing; ``None`` for one that has no prediction.
        carriers: What carries a gradient.
    """

    record: Record | None
    carriers: list[Tensor]


@dataclass(frozen=True)
class ToStageBefore:
    """Where the exact gradient of what was received goes, if the batch is run again for it.

    Attributes:
        inlet: The start of this process's stages.
        number: The batch's, for the neighbours.
        tensors: What was received.
        carries: For each, whether it carries a gradient.
    """

    inlet: Inlet
    number: int
    tensors: Sequence[Tensor]
    carries: Sequence[bool]

    def take(self, gradients: Sequence[Tensor | None] | None) -> None:
        """See :meth:`~lightning_sg.crossings.replay.TakesExact.take`."""
        leaves = [tensor for tensor, carries in zip(self.tensors, self.carries) if carries]
        if gradients is None:
            self.inlet.send_no_residual(self.number, [Residuals(leaves)])
        else:
            self.inlet.send_residual(self.number, [Residuals(leaves, gradients)])


class TrainingPass(EvaluationPass):
    """A training batch, from the activations that come in to the target that goes back.

    On a middle stage it goes: :meth:`receive`; the user's layers; :meth:`hand_over`, which sends, receives what is due,
    learns and predicts; all this as often as the step runs the network; :meth:`end_forward`; :meth:`backward`, which
    goes backward from all predictions and replies.

    Args:
        stage: This process.
        program: How it runs a step.
        fingerprint: Of the batch.
        most: For each boundary, how often the step may cross it; ``None`` if that is not known.
        arrivals: How the stage comes by its activations.
    """

    def __init__(
        self,
        stage: Stage,
        program: StageProgram,
        fingerprint: int,
        most: Mapping[str, int] | None,
        arrivals: Arrivals,
    ) -> None:
        super().__init__(stage, program, fingerprint, most)
        self._arrivals = arrivals
        self._session = stage.session
        self._batch = stage.session.current
        self._arrived: list[Received] = []
        self._out: list[HandedOver] = []
        self._used = 0  # how many of these have gone backward
        self._sent: Sent | None = None
        self._answers = 0  # how many have gone to the stage before
        self._gone_backward = 0  # how many of the crossings that have come in
        self._closed = False

    @property
    def leaves(self) -> list[Tensor]:
        """What was received and carries a gradient."""
        return [leaf for each in self._arrived for leaf in each.leaves]

    @property
    def _automatic(self) -> bool:
        return bool(self._stage.session.module.automatic_optimization)

    def skip(self) -> None:
        """See :meth:`EvaluationPass.skip`; this process's predictors leave the batch out."""
        self._session.pass_by()
        self._closed = True
        super().skip()

    # ------------------------------------------------------------------ forward

    def receive(self, fakes: list[Tensor]) -> list[Tensor]:
        """The start of this process's stages: takes the activations, leaves from which the target will be read."""
        received = Received()
        self._arrived.append(received)
        if not torch.is_grad_enabled():
            return super().receive(fakes)
        crossing = self._begin_stages()
        arrived = self._arrivals.arrive(self._number, self._fingerprint, fakes, crossing)
        received.wants_target, received.coupled = arrived.wants_target, arrived.coupled
        replayed, boundary = self._batch.replayed, str(self._program.inlet.boundary)
        if replayed is not None:
            before = ToStageBefore(self._program.inlet, self._number, arrived.tensors, arrived.carries)
            replayed.note_inputs(boundary, arrived.tensors, list(arrived.carries), before)
        tensors = []
        for tensor, carries in zip(arrived.tensors, arrived.carries):
            if carries:
                leaf = tensor.requires_grad_()
                received.leaves.append(leaf)
                tensor = leaf.clone()  # an in-place operation may follow, which a leaf refuses
            tensors.append(tensor)
        self._session.watched.received = self.leaves
        self._session.finite.receives(boundary, received.leaves)
        return tensors

    def hand_over(self, tensors: list[Tensor]) -> list[Tensor]:
        """The end of this process's stages: send → receive what is due → learn → predict.

        :meth:`backward` follows: go backward from the prediction → reply.
        """
        self._check_data(tensors)
        if not self._handed_over:
            self._stage.decide_end(self._batch.number)
        carriers = [tensor for tensor in tensors if differentiable(tensor)]
        batch, trainer = self._batch, self._program.outlet.trainer
        if carriers and self._session.finite.crosses(trainer.name, carriers, trainer.told(batch.context)):
            return self._leave_out(tensors, carriers)
        if not carriers:
            self._send(tensors, None)
            return self._leave(tensors)
        skipped, visits = not self._session.updates.before(trainer.name), batch.visits[trainer.name]
        record = trainer.open(carriers, batch.context, batch.loss, batch.plan, skipped=skipped, visits=visits)
        if batch.replayed is not None:
            batch.replayed.note(trainer.name, record)
        self._expect(record, carriers)
        self._send(tensors, record)  # so that the next stage has its work
        trainer.receive_due(record.step)
        trainer.learn_due(record.step)
        trainer.predict(record)
        self._out.append(HandedOver(record, carriers))
        return self._leave(tensors)

    def end_forward(self, why: str = "") -> None:
        """See :meth:`EvaluationPass.end_forward`; makes the surrogate of the loss."""
        super().end_forward(why)
        self._session.pass_by()
        if self._sent is not None and self._sent.kept is not None:
            self._sent.kept.received = [received.leaves for received in self._arrived]
        if self._automatic and self._handed_over:
            self.result = self._surrogate()
        inlet, outlet = self._program.inlet, self._program.outlet
        if self._received and outlet.boundary is not None and not self._handed_over:
            raise BoundaryError(
                f"{self._stage.status.name}: {self._stage.status.doing} has crossed boundary '{inlet.boundary}' and "
                f"boundary '{outlet.boundary}' was not reached, so its loss would be computed in the middle of the "
                "stages. Every training step that runs the network must pass every boundary on its way to the loss."
            )

    @property
    def several(self) -> bool:
        """See :attr:`EvaluationPass.several`; by hand every process runs the whole step anyway."""
        return self._automatic and super().several

    def _may_go_on(self, boundary: str | None, crossings: int) -> bool:
        return self._automatic and super()._may_go_on(boundary, crossings)

    def _check_foreseen(self, crossing: int) -> None:
        if self._automatic:
            super()._check_foreseen(crossing)

    def _bound_lead(self) -> None:
        if self._handed_over and self._sent is None:
            self._program.outlet.await_answers(self._number, self._stage.delay + 1)

    # ------------------------------------------------------------------ backward

    def backward(self, loss: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Goes backward through this process's stages and, with automatic optimization, replies to the stage before.

        Args:
            loss: What the step returned; tensors without data stand for the surrogate.
            run: Lightning's backward pass, of a loss and keyword arguments.
        """
        loss = self._loss_here(loss)
        self._gone_backward = len(self._arrived)
        self._program.data_parallel.prepare(loss)
        retain = {"retain_graph": True} if self._stage.keeps_graph else {}
        if not self._automatic:
            self._program.first_uses.look()
        # Reply before copies of a tied weight meet: the stage before may wait for it before its backward pass.
        with self._program.tied.summing(self._program.data_parallel):
            result = run(loss, **retain)
            self._program.first_uses.begin()  # hooks may have changed an average; a use shows in gradients
            self._program.first_uses.look()
            if self._automatic:
                self.close()
            elif any(received.coupled for received in self._arrived):
                self._reply()  # by hand there may be more backward passes, and the stage before waits for each
        return result

    def close(self) -> None:
        """Answers the stage before for good: targets, or that there are none, and residuals. Once for each batch."""
        if self._closed:
            return
        self._closed = True
        if self._arrived and not self._answers:
            self._reply()
        if self._sent is not None:
            self._sent.known = self._gone_backward
        plan = self._batch.plan
        if plan.keeps_graph and any(received.wants_target for received in self._arrived):
            # Otherwise the stage before has left the batch out, and waits for nothing.
            if self._stage.grid.is_last:
                self._program.inlet.send_residual(self._number, self._residuals())
            elif self._sent is None or self._sent.kept is None:  # nothing of this process carries a gradient on
                self._program.inlet.send_residual(self._number, [Residuals(each.leaves) for each in self._arrived])
        elif self._batch.replayed is not None and any(received.wants_target for received in self._arrived):
            after = self._session.exact.neighbour(str(self._program.inlet.boundary), 1)
            if after not in self._batch.replayed.records:  # nothing of the stage carries a gradient on
                self._program.inlet.send_no_residual(self._number, [Residuals(each.leaves) for each in self._arrived])
        self._arrived = []
        self._await_end()

    def _reply(self) -> None:
        """Sends the gradients that have come to what was received, for each crossing, since they were sent last."""
        inlet, targets = self._program.inlet, []
        for received in self._arrived:
            target: Sequence[Tensor] = ()
            if received.wants_target and any(leaf.grad is not None for leaf in received.leaves):
                gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in received.leaves]
                target = [self._batch.scale.removed(gradient) for gradient in gradients]
            if not self._session.finite.teaches(str(inlet.boundary), target):
                target = ()
            for leaf in received.leaves:
                leaf.grad = None
            if target:
                before = received.sent
                received.sent = [*target] if before is None else [old + new for old, new in zip(before, target)]
            targets.append(target)
        inlet.reply(self._number, targets, self._answers)
        self._answers += 1

    def finish_step(self) -> None:
        """The step is over: with manual optimization its backward passes are, too."""
        self._program.first_uses.look()
        if not self._automatic:
            self.close()

    # ------------------------------------------------------------------ parts of it

    def _expect(self, record: Record, carriers: list[Tensor]) -> None:
        """Notes what will come back for a crossing that is about to be sent."""
        first = self._sent is None
        if self._sent is None:
            records = self._batch.visits[self._program.outlet.trainer.name].records
            self._sent = Sent(self._number, self._batch.number, records, self._batch.plan)
            if self._batch.plan.keeps_graph:
                self._sent.kept = KeptGraph([], [], [], self._batch.scale, self._batch.plan.applies)
        self._sent.places.append(self._handed_over)
        kept = self._sent.kept
        if kept is not None:
            kept.carriers.append(carriers)
            kept.crossings = self._session.crossed
            kept.received = [received.leaves for received in self._arrived]
        if first:
            self._program.outlet.expect(self._sent)

    def _send(self, tensors: Sequence[Tensor], record: Record | None) -> None:
        self._program.outlet.send(
            self._message(
                tensors,
                wants_target=record is not None and record.wants_target,
                coupled=record is not None and record.coupled,
                metrics=self._stage.metrics.leave(),
                compression=self._stage.compression,
            )
        )

    def _leave_out(self, tensors: list[Tensor], carriers: list[Tensor]) -> list[Tensor]:
        """Skips the batch: hands on NaN, so that the next stages skip it, too."""
        trainer = self._program.outlet.trainer
        trainer.pass_by(self._batch.plan, self._batch.visits[trainer.name])
        taken = iter(blocked(carriers))
        tensors = [next(taken) if differentiable(tensor) else tensor for tensor in tensors]
        self._send(tensors, None)
        self._out.append(HandedOver(None, carriers))
        return self._leave(tensors)

    def _leave(self, tensors: list[Tensor]) -> list[Tensor]:
        """Leaves the user's step; with manual optimization it goes on without data, as its backward pass is in it."""
        if self._automatic:
            return super()._leave(tensors)
        self._handed_over += 1
        return [fake_like(tensor) for tensor in tensors]

    def _surrogate(self) -> Tensor:
        """A scalar whose backward pass is that of the gradients to use, for what has been handed over since the last.

        Boundaries on the way, between this process's stages, have predictions of their own: what carries no gradient
        here goes backward, too.
        """
        new, self._used = self._out[self._used :], len(self._out)
        used: list[tuple[Gradients | None, HandedOver]]
        if self._sent is not None and self._sent.coupled:
            parts = dict(zip(map(id, self._sent.records), self._program.outlet.await_targets(self._sent)))
            used = [(parts.get(id(each.record)), each) for each in self._out]
        else:
            used = [(None if each.record is None else each.record.prediction, each) for each in new]
        losses = []
        for gradients, each in used:
            if gradients is not None or (self._stage.has_boundaries_within and any(each is one for one in new)):
                samples = 1 if each.record is None else each.record.samples
                losses.append(inject(gradients, each.carriers, samples))
        if not losses:
            return torch.zeros((), device=self._stage.grid.device, requires_grad=True)
        return sum(losses[1:], losses[0])

    def _loss_here(self, loss: Tensor) -> Tensor:
        """The loss to go backward from: of a tensor without data, this process's surrogate."""
        if is_fake(loss):
            status = self._stage.status
            if self._stage.grid.is_last:
                raise WithoutDataError(f"{status.name}: the loss of {status.doing}")
            return self._surrogate()
        waits = self._sent is not None and self._sent.coupled
        return loss + self._surrogate().to(loss.dtype) if waits and not self._automatic else loss

    def _residuals(self) -> list[Residuals]:
        """In the last process: exact gradient minus the target that was sent, or the exact one, for each crossing."""
        exact, residuals = self._batch.exact, []
        whole = self._batch.plan.whole
        for received in self._arrived:
            parts: list[Tensor | None] = []
            nothing = [0.0] * len(received.leaves)
            sent: Sequence[Tensor | float] = nothing if whole or received.sent is None else received.sent
            if all(id(leaf) in exact for leaf in received.leaves):  # it has gone backward
                found = [exact[id(leaf)] for leaf in received.leaves]
                parts = [None if each is None else each.float() - target for each, target in zip(found, sent)]
            residuals.append(Residuals(received.leaves, parts))
        return residuals


__all__ = ["TrainingPass"]
