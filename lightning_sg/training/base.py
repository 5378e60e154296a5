"""What supplies the gradient at one boundary, in an order that does not depend on where the stages run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import tree_map_only
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.precision import without_autocast
from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.predictors.layout import Layout
from lightning_sg.predictors.stage_size import StageSize
from lightning_sg.replicas import Replicas
from lightning_sg.training.ledger import Ledger
from lightning_sg.training.metrics import cosine
from lightning_sg.training.record import Record, TargetPlan, Visits
from lightning_sg.training.targets import TargetsOfBackwardPass, TargetSource

#: Makes a context for an action, by the name under which profilers see it.
Profile = Callable[[str], AbstractContextManager[Any]]
#: Takes the predictor, a batch's activations and its targets; returns what is to be learned from it and from others.
Echo = Callable[[Callable[[Gradients, Any], Gradients | None], Gradients, Gradients], tuple[Gradients, Gradients]]


def _nobody_knows(_boundary: str) -> None:
    return None


class BoundaryTrainer(ABC):
    """Supplies the gradient of one boundary, by a predictor or by a rule, and keeps the batches under way there.

    The next stage's target for batch ``t`` is learned from before the prediction for batch ``t + 1 + delay``. An exact
    gradient takes that long for each boundary on its way: it is learned from before the prediction for
    ``t + distance * (1 + delay)``.

    A crossing goes through :meth:`open`, :meth:`receive_due`, :meth:`learn_due` and :meth:`predict`, in this order. A
    batch may cross the boundary several times: its crossings share its step, and each has a target of its own.

    Attributes:
        step: How many batches have crossed the boundary.
        distance: The number of boundaries from this one to the end of the network, this one included.
        shapes: Of what crosses the boundary, as a traced step showed them.
        layout: The order of their dimensions.
        stage: The size of the stage before it, as a traced step showed it.
        targets: Where targets come from.
        ledger: The batches under way.
        profile: Shows actions to the trainer's profiler.
        inquire: Says why what is predicted at the boundary of that name is not finite, or ``None`` if nobody knows.

    Args:
        name: The boundary's name, for messages.
        delay: Extra steps before a target is learned from; 0 means the next step.
        replicas: The replicas whose batches this boundary learns from together.
    """

    def __init__(self, name: str, delay: int, replicas: Replicas) -> None:
        self.name = name
        self.delay = delay
        self.step = 0
        self.distance = 1
        self.shapes: list[tuple[int, ...]] = []
        self.layout = Layout()
        self.stage: StageSize | None = None
        self.targets: TargetSource = TargetsOfBackwardPass()
        self.ledger: Ledger[Record] = Ledger()
        self.profile: Profile = nullcontext
        self.inquire: Callable[..., str | None] = _nobody_knows
        self._replicas = replicas
        self._metrics: dict[str, Tensor] = {}
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what it is

    @property
    @abstractmethod
    def described(self) -> str:
        """What supplies the gradient, in a word, for messages."""

    @property
    def late_share(self) -> float:
        """How much of the true gradient its stage applies when it arrives late; the same in every process."""
        return 0.0

    @property
    def age(self) -> int:
        """How many batches late an exact gradient comes."""
        return self.distance * (1 + self.delay)

    @property
    def needs_true_gradient(self) -> bool:
        """Whether there is nothing else that it could supply."""
        return False

    @property
    def waits(self) -> bool:
        """Whether its stage waits for the true gradient of every batch and uses it."""
        return False

    @property
    def target_rms(self) -> Tensor | None:
        """The running root mean square of the targets, one for each activation, if it is known."""
        return None

    @abstractmethod
    def wants_exact(self, context: Any) -> bool:
        """Whether exact targets are of use; the same in every process, built or not."""

    def told(self, context: Any) -> Any:
        """What is used of the context."""
        return context

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it has seen the first batch in this process."""

    # ------------------------------------------------------------------ one batch

    def open(
        self,
        activations: Iterable[Tensor],
        context: Any,
        loss: LossInfo | None,
        plan: TargetPlan = TargetPlan(),
        *,
        skipped: bool = False,
        visits: Visits | None = None,
    ) -> Record:
        """Takes in the next batch, or the next crossing of the same one, without waiting for anything.

        Args:
            activations: What crosses the boundary and can carry a gradient, each ``(N, ...)``.
            context: What the predictor is told of the batch.
            loss: What is known about the model's own loss.
            plan: What the batch does about targets.
            skipped: Whether the predictor does not learn from this batch.
            visits: The crossings of this batch; by default this is its only one.

        Raises:
            SyntheticGradientsError: If the predictor cannot be built for this boundary.
        """
        inputs = tuple(activation.detach().float() for activation in activations)
        if any(activation.ndim == 0 for activation in inputs):
            raise SyntheticGradientsError(
                f"A scalar reaches boundary '{self.name}'. What crosses a boundary has the samples first: give it a "
                "batch dimension, or compute it in the stage that uses it."
            )
        self.prepare(inputs, context, loss)
        visits = Visits() if visits is None else visits
        step = self._count(visits)
        wants, learns = self._asks(plan, step)
        # A batch is coupled at all of its crossings, or at none: a guard may change its mind in between.
        coupled = visits.records[0].coupled if visits.records else plan.coupled or self.waits
        record = Record(step, inputs, context, wants or coupled, learns, coupled, skipped, due=step + 1 + self.delay)
        if plan.exact:
            record.due = record.exact_due = step + self.age
        record.crossing = len(visits.records)
        visits.records.append(record)
        return record

    def _count(self, visits: Visits) -> int:
        """Counts a batch when it crosses for the first time; returns its step."""
        if visits.step is None:
            visits.step = self.step
            self.step += 1
        return visits.step

    def pass_by(self, plan: TargetPlan, visits: Visits | None = None) -> None:
        """A batch does not cross the boundary, or the stage before leaves it out.

        It counts only where corrections do, which are due by the numbers of batches.
        """
        visits = Visits() if visits is None else visits
        if plan.corrects and visits.step is None:
            self.receive_due(self.step)
            self._count(visits)

    def receive_due(self, now: int) -> None:
        """Brings in the targets and exact gradients that are due before the prediction for batch ``now``."""
        for record in self.ledger:
            if record.step + 1 + self.delay <= now:
                self.targets.target(record)
            if record.exact_due is not None and record.exact_due <= now:
                self.targets.exact(record)

    def learn_due(self, now: int) -> None:
        """Learns from the batches that are due before the prediction for batch ``now``."""
        for record in self.ledger.due(now):
            self.targets.target(record)
            if not record.skipped:
                self._learn(record)

    def predict(self, record: Record) -> None:
        """Puts the synthetic gradient into ``record``, which is under way from now on.

        Raises:
            NonFinitePredictionError: If the prediction has a NaN or an infinity in it and there is no guard.
        """
        self.ledger.add(record.step, record, record.due, record.crossing)
        with without_autocast(record.activations[0].device.type):
            record.prediction = self._predict(record)

    def learn(self, record: Record, echo: Echo | None = None) -> None:
        """Learns from a batch whose target comes at a time of its own.

        Args:
            record: The batch, with its target.
            echo: Adds to what this batch is to learn what others are.
        """
        self.ledger.drop(record.step, record.crossing)
        self._learn(record, echo)

    def collect(self) -> None:
        """Brings in all targets and exact gradients under way, without learning from those that are not due."""
        for record in self.ledger:
            self.targets.target(record)
        for record in self.ledger:
            if record.exact_due is not None:
                self.targets.exact(record)

    def take_metrics(self) -> dict[str, Tensor]:
        """The metrics of the last batch learned from, once: scalars by name."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def check_finite(self) -> None:  # noqa: B027 (a rule has nothing to check)
        """Asks the device whether a prediction since the last time was not finite; see the predictor's trainer."""

    # ------------------------------------------------------------------ for those who know what it is

    @abstractmethod
    def prepare(self, inputs: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Builds and restores what needs the sizes of the first batch, unless that is done already."""

    @abstractmethod
    def _asks(self, plan: TargetPlan, step: int) -> tuple[bool, bool]:
        """Whether the batch of this step wants a target, and whether that will be good enough to learn from."""

    @abstractmethod
    def _predict(self, record: Record) -> Gradients | None:
        """The per-sample synthetic gradient to use, or ``None`` for none."""

    @abstractmethod
    def _learn(self, record: Record, echo: Echo | None = None) -> None:
        """Learns from a batch that is due."""

    def _best_target(self, record: Record) -> Gradients | None:
        """The exact target if the batch has one, else the next stage's; notes how far they agree."""
        if record.exact_due is None or self.distance == 1:
            return record.targets
        exact = record.exact_targets
        if exact is not None:
            # Without targets, the next stages were given no gradient at all.
            targets = record.targets or tuple(torch.zeros_like(part) for part in exact)
            self._metrics["bootstrapped_cosine"] = cosine(targets, exact)
        return exact

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on exactly: tensors, numbers and strings only."""
        if not self.ready:
            return self._restored or {"step": self.step, "pending": []}
        self.collect()
        state = {"step": self.step, **self._own_state(), "pending": [record.state_dict() for record in self.ledger]}
        # A copy: the saved state must not change when the training goes on.
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        saved["pending"] = self._replicas.join(saved["pending"], _samples_of)
        return saved

    def kinds(self) -> dict[str, Any]:
        """The kind of predictor or rule and the delay, saved to tell what a resumed run has changed."""
        return {"kind": self.described, "delay": self.delay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, what depends on sizes with the next batch."""
        self.step = state["step"]
        self._restored = state
        self.ledger.clear()

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What is saved besides the batches under way."""

    def _restore_batches(self, pending: list[dict[str, Any]], device: torch.device) -> None:
        """Puts the saved batches back under way, those of this replica."""
        shared = self._replicas.share(pending, _samples_of)
        for entry in tree_map_only(Tensor, lambda tensor: tensor.to(device), shared):
            record = Record.load(entry)
            self.ledger.add(record.step, record, record.due, record.crossing)


def _samples_of(entry: dict[str, Any]) -> int:
    """The number of samples of a saved record."""
    return int(entry["activations"][0].shape[0])


__all__ = ["BoundaryTrainer", "Echo", "Profile"]
