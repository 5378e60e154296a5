"""One batch on the stages of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_sg.boundary import differentiable
from lightning_sg.crossings.inject import blocked, inject
from lightning_sg.crossings.kept_graph import KeptGraph
from lightning_sg.distributed.arrivals import Arrivals
from lightning_sg.distributed.program import StageProgram
from lightning_sg.distributed.stage import Stage
from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.partition.fakes import fake_like, is_fake
from lightning_sg.training.record import Record
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

    Attributes:
        result: What the step's result is where it ends before the loss.

    Args:
        stage: This process.
        program: How it runs a step.
        fingerprint: Of the batch.
    """

    result: Tensor | None = None

    def __init__(self, stage: Stage, program: StageProgram, fingerprint: int) -> None:
        self._stage = stage
        self._program = program
        self._number = stage.status.number
        self._fingerprint = fingerprint
        self._reached = False
        self._left = False
        self._replied = False

    @property
    def in_last_stage(self) -> bool:
        """Whether the step has come to where the loss is computed."""
        return self._reached and self._stage.grid.is_last

    def receive(self, fakes: list[Tensor]) -> list[Tensor]:
        """The start of this process's stages: takes the activations in the place of tensors without data."""
        self._begin_stages()
        shapes = [tuple(fake.shape) for fake in fakes]
        return list(self._program.inlet.take(self._number, self._fingerprint, shapes).tensors)

    def hand_over(self, tensors: list[Tensor]) -> list[Tensor]:
        """The end of this process's stages: sends the activations on, and leaves the step."""
        self._left = True
        self._check_data(tensors)
        self._program.outlet.send(self._message(tensors))
        self._program.outlet.await_answers(self._number, MAX_BATCHES_IN_EVALUATION)
        raise StageEnds

    def check_crossed(self) -> None:
        """Refuses a step that did not pass this process's boundaries.

        Raises:
            BoundaryError: If one was not reached.
        """
        missing = None
        if self._program.inlet.boundary is not None and not self._reached:
            missing = self._program.inlet.boundary
        elif self._program.outlet.boundary is not None and not self._left:
            missing = self._program.outlet.boundary
        if missing is not None:
            raise BoundaryError(
                f"{self._stage.status.name}: boundary '{missing}' was not reached in {self._stage.status.doing}, so "
                "the neighbouring stage waits for nothing. Every step must pass every boundary on its way to the loss."
            )

    def _check_data(self, tensors: Sequence[Tensor]) -> None:
        """Refuses to hand on what was computed from a parameter or activation that this process does not have.

        Raises:
            WithoutDataError: If a tensor has no data.
        """
        fake = next((tensor for tensor in tensors if is_fake(tensor)), None)
        if fake is not None:
            raise WithoutDataError(
                f"{self._stage.status.name}: a tensor of shape {tuple(fake.shape)} that reaches boundary "
                f"'{self._program.outlet.boundary}' in {self._stage.status.doing}"
            )

    def finish_step(self) -> None:
        """The step is over: answers the stage before."""
        self._program.first_uses.look()
        if not self._replied:
            self._program.inlet.reply(self._number, ())

    def skip(self) -> None:
        """There are no activations: nobody before waits for an answer, and the stage after has none either."""
        self._left = self._replied = True
        if self._program.outlet.boundary is not None:
            self._program.outlet.send(self._message((), skipped=True))

    def _begin_stages(self) -> None:
        self._reached = True
        self._program.first_uses.begin()
        self._stage.own_stages_begin()

    def _message(self, tensors: Sequence[Tensor], **what: Any) -> Activations:
        status = self._stage.status
        return Activations(
            self._number,
            status.doing,
            tensors,
            fingerprint=self._fingerprint,
            batches=status.places[self._number].batches,
            last=status.places[self._number].last,
            ends=self._stage.stopping.ends,
            owners=self._program.first_uses.owners,
            **what,
        )


class TrainingPass(EvaluationPass):
    """A training batch, from the activations that come in to the target that goes back.

    On a middle stage it goes: :meth:`receive`; the user's layers; :meth:`hand_over`, which sends, receives what is due,
    learns and predicts; :meth:`backward`, which goes backward and replies.

    Attributes:
        leaves: What was received and carries a gradient.

    Args:
        stage: This process.
        program: How it runs a step.
        fingerprint: Of the batch.
        arrivals: How the stage comes by its activations.
    """

    def __init__(self, stage: Stage, program: StageProgram, fingerprint: int, arrivals: Arrivals) -> None:
        super().__init__(stage, program, fingerprint)
        self.leaves: list[Tensor] = []
        self._arrivals = arrivals
        self._session = stage.session
        self._batch = stage.session.current
        self._wants_target = False
        self._keeps_graph = False

    def skip(self) -> None:
        """See :meth:`EvaluationPass.skip`; this process's predictors leave the batch out."""
        self._session.pass_by()
        super().skip()

    # ------------------------------------------------------------------ forward

    def receive(self, fakes: list[Tensor]) -> list[Tensor]:
        """The start of this process's stages: takes the activations, leaves from which the target will be read."""
        if not torch.is_grad_enabled():
            return super().receive(fakes)
        self._begin_stages()
        arrived = self._arrivals.arrive(self._number, self._fingerprint, fakes)
        self._wants_target = arrived.wants_target
        tensors = []
        for tensor, carries in zip(arrived.tensors, arrived.carries):
            if carries:
                leaf = tensor.requires_grad_()
                self.leaves.append(leaf)
                tensor = leaf.clone()  # an in-place operation may follow, which a leaf refuses
            tensors.append(tensor)
        self._session.watched.received = self.leaves
        self._session.finite.receives(self._program.inlet.boundary or "", self.leaves)
        return tensors

    def hand_over(self, tensors: list[Tensor]) -> list[Tensor]:
        """The end of this process's stages: send → receive what is due → learn → predict.

        :meth:`backward` follows: go backward from the prediction → reply.
        """
        self._left = True
        self._check_data(tensors)
        self._stage.decide_end(self._batch.number)
        carriers = [tensor for tensor in tensors if differentiable(tensor)]
        if not carriers:
            return self._hand_over_without_gradient(tensors)
        batch, outlet, trainer = self._batch, self._program.outlet, self._program.outlet.trainer
        if self._session.finite.crosses(trainer.name, carriers, trainer.told(batch.context)):
            return self._leave_out(tensors, carriers)
        skipped = not self._session.updates.before(trainer.name)
        record = trainer.open(carriers, batch.context, batch.loss, batch.plan, skipped=skipped)
        outlet.expect(record, self._number, self._kept(carriers))
        self._send(tensors, wants_target=record.wants_target)  # so that the next stage has its work
        trainer.receive_due(record.step)
        trainer.learn_due(record.step)
        trainer.predict(record)
        if record.coupled:
            outlet.await_target(record)
        self.result = self._surrogate(record, carriers)
        return self._leave(tensors)

    # ------------------------------------------------------------------ backward

    def backward(self, loss: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Goes backward through this process's stages and, with automatic optimization, replies to the stage before.

        Args:
            loss: What the step returned; tensors without data stand for the surrogate.
            run: Lightning's backward pass, of a loss and keyword arguments.
        """
        loss = self._loss_here(loss)
        self._program.data_parallel.prepare(loss)
        retain = {"retain_graph": True} if self._stage.keeps_graph else {}
        automatic = self._session.module.automatic_optimization
        if not automatic:
            self._program.first_uses.look()
        # Reply before copies of a tied weight meet: the stage before may wait for it before its backward pass.
        with self._program.tied.summing(self._program.data_parallel):
            result = run(loss, **retain)
            self._program.first_uses.begin()  # hooks may have changed an average; a use shows in gradients
            self._program.first_uses.look()
            if automatic:
                self.reply()
        return result

    def reply(self) -> None:
        """Answers the stage before: the target of this batch, or that there is none. Once for each batch."""
        if self._replied:
            return
        self._replied = True
        inlet, leaves = self._program.inlet, self.leaves
        targets: Sequence[Tensor] = ()
        if self._wants_target and any(leaf.grad is not None for leaf in leaves):
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            targets = [self._batch.scale.removed(gradient) for gradient in gradients]
        if inlet.boundary is not None and not self._session.finite.teaches(inlet.boundary, targets):
            targets = ()
        inlet.reply(self._number, targets)
        if self._batch.plan.exact and not self._wants_target:
            pass  # the stage before has left the batch out, and waits for nothing
        elif self._batch.plan.exact and self._stage.grid.is_last:
            inlet.send_residual(self._number, leaves, self._residual(targets))
        elif self._batch.plan.exact and not self._keeps_graph:
            inlet.send_residual(self._number, leaves, [])  # nothing of this process carries a gradient on
        self.leaves = []

    def finish_step(self) -> None:
        """The step is over: with manual optimization its backward passes are, too."""
        self._program.first_uses.look()
        if not self._session.module.automatic_optimization:
            self.reply()

    # ------------------------------------------------------------------ parts of it

    def _kept(self, carriers: list[Tensor]) -> KeptGraph | None:
        """The graph of this batch, if its exact gradient is asked for."""
        if not self._batch.plan.exact:
            return None
        self._keeps_graph = True
        return KeptGraph(carriers, self._session.crossed, self.leaves, self._batch.scale)

    def _send(self, tensors: Sequence[Tensor], *, wants_target: bool) -> None:
        self._program.outlet.send(
            self._message(
                tensors,
                wants_target=wants_target,
                metrics=self._stage.metrics.leave(),
                compression=self._stage.compression,
            )
        )

    def _hand_over_without_gradient(self, tensors: list[Tensor], within: Sequence[Tensor] = ()) -> list[Tensor]:
        self._send(tensors, wants_target=False)
        nothing = torch.zeros((), device=self._stage.grid.device, requires_grad=True)
        self.result = inject(None, within) if within else nothing
        self._program.outlet.await_answers(self._number, self._stage.delay + 1)
        return self._leave(tensors)

    def _leave_out(self, tensors: list[Tensor], carriers: list[Tensor]) -> list[Tensor]:
        """Skips the batch: hands on NaN, so that the next stages skip it, too."""
        self._program.outlet.trainer.pass_by(self._batch.plan)
        taken = iter(blocked(carriers))
        tensors = [next(taken) if differentiable(tensor) else tensor for tensor in tensors]
        # Boundaries on the way, between this process's stages, have predictions of their own.
        return self._hand_over_without_gradient(tensors, carriers if self._stage.has_boundaries_within else ())

    def _surrogate(self, record: Record, carriers: list[Tensor]) -> Tensor:
        """A scalar whose backward pass is that of the gradient to use."""
        if record.used is None and not self._stage.has_boundaries_within:
            return torch.zeros((), device=self._stage.grid.device, requires_grad=True)
        # Without a gradient too: boundaries on the way, between this process's stages, have predictions of their own.
        return inject(record.used, carriers, record.samples)

    def _leave(self, tensors: list[Tensor]) -> list[Tensor]:
        """Leaves the user's step; with manual optimization it goes on without data, as its backward pass is in it."""
        if self._session.module.automatic_optimization:
            raise StageEnds
        return [fake_like(tensor) for tensor in tensors]

    def _loss_here(self, loss: Tensor) -> Tensor:
        """The loss to go backward from: of a tensor without data, this process's surrogate."""
        if not is_fake(loss):
            return loss
        status = self._stage.status
        if self._stage.grid.is_last:
            raise WithoutDataError(f"{status.name}: the loss of {status.doing}")
        surrogate, self.result = self.result, None
        if surrogate is None:  # a second backward of one batch
            return torch.zeros((), device=self._stage.grid.device, requires_grad=True)
        return surrogate

    def _residual(self, targets: Sequence[Tensor]) -> list[Tensor | None]:
        """In the last stage: exact gradient minus the target that was sent, for each leaf."""
        found = self._session.exact_pass
        exact = found.leaves if found is not None else []
        sent: Sequence[Tensor | float] = targets or [0.0] * len(exact)
        return [None if leaf is None else leaf.float() - target for leaf, target in zip(exact, sent)]


__all__ = ["EvaluationPass", "StageEnds", "TrainingPass", "WithoutDataError"]
