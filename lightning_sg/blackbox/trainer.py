"""Supplies the gradient of one scored boundary: explores, takes in the scores, has the estimator learn."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import tree_map_only
from lightning_sg.blackbox.boundary import ScoredBoundary
from lightning_sg.blackbox.context import context_rows
from lightning_sg.blackbox.estimator import Example
from lightning_sg.blackbox.learning import Learning, ScoredOptions
from lightning_sg.blackbox.record import Pending, Visit
from lightning_sg.blackbox.scores import are_coming, arrived, checked_scores, refuse_way_around
from lightning_sg.crossings.base import BatchContext
from lightning_sg.crossings.inject import inject
from lightning_sg.errors import BoundaryError, NonFiniteLossError
from lightning_sg.gradient_flow import refuse_recomputation
from lightning_sg.precision import without_autocast
from lightning_sg.training.ledger import Ledger
from lightning_sg.training.metrics import compare

# In so many batches it is looked whether the score's graph goes around the boundary, which takes a walk through it.
_LOOKED_AT = 10


class ScoredTrainer:
    """One scored boundary in training.

    Scores that come at once are learned from at once. Scores that come later, as futures, are those of batch ``t`` and
    are learned from before the prediction for batch ``t + 1 + delay``, whenever they arrive, so that a run can be
    repeated.

    Attributes:
        name: The boundary's name.
        learning: Its estimator.
        ledger: Rows whose scores come later.

    Args:
        name: The boundary's name.
        boundary: The boundary.
        options: What all scored boundaries are told alike.
    """

    def __init__(self, name: str, boundary: ScoredBoundary, options: ScoredOptions) -> None:
        self.name = name
        self.learning = Learning(name, boundary, options)
        self.ledger: Ledger[Pending] = Ledger()
        self._boundary = boundary
        self._options = options
        self._batch: BatchContext | None = None
        self._told: Any = None
        self._visits: list[Visit] = []
        self._scored = 0  # how many of this batch's visits are
        self._looked = 0
        self._warned = False
        self._last_mean: Tensor | None = None
        self._metrics: dict[str, Tensor] = {}
        self._restored: list[dict[str, Any]] = []

    @property
    def is_open(self) -> bool:
        """See :class:`~lightning_sg.blackbox.boundary.Scoring`."""
        return self._batch is not None

    @property
    def unscored(self) -> bool:
        """Whether something has crossed in this batch whose score has not come back."""
        return bool(self._visits) and not self.learning.estimator.passes

    @property
    def number(self) -> int:
        """The number of the training batch."""
        assert self._batch is not None
        return self._batch.number

    def begin(self, batch: BatchContext, told: Any) -> None:
        """A training batch begins.

        Args:
            batch: The batch.
            told: What estimators are told of it, where the boundary is given no context.
        """
        self._batch, self._told = batch, told
        self._visits, self._scored = [], 0

    def end(self) -> None:
        """The training batch is over: lets go of what belongs to it."""
        self._batch = self._told = None
        self._visits = []

    # ------------------------------------------------------------------ there

    def cross(self, activation: Tensor, context: Any) -> Tensor:
        """See :class:`~lightning_sg.blackbox.boundary.Scoring`.

        Raises:
            BoundaryError: If the boundary is called again before the scores of several evaluations have come.
            SyntheticGradientsError: If it cannot work with what crosses it.
        """
        refuse_recomputation(self.name)
        boundary, estimator, number = self._boundary, self.learning.estimator, self.number
        if self._visits and boundary.evaluations > 1:
            raise BoundaryError(
                f"'{self.name}' is called again before the scores of its first call have come, with "
                f"evaluations={boundary.evaluations}. Call `loss` after each call, or use evaluations=1."
            )
        self._warn_of_detached(activation)
        detached = activation.detach().float()
        generator = self.learning.numbers.of(number, "explore", self._scored + len(self._visits), detached.device)
        with self.learning.explaining():
            if estimator.in_pairs:
                draw = boundary.sampling.draw_pairs(detached, boundary.evaluations // 2, generator, number)
            else:
                draw = boundary.sampling.draw(detached, boundary.evaluations, generator, number)
            rows = context_rows(context, self._told, detached.shape[0], draw.evaluations)
        visit = Visit(activation, draw, rows)
        self._visits.append(visit)
        if estimator.passes:
            whole = activation.repeat(draw.evaluations, *[1] * (activation.ndim - 1))
            return estimator.passed(whole, draw, generator).to(boundary.dtype_of(activation))
        value = draw.value.to(boundary.dtype_of(activation), copy=True)  # what follows may write to it
        if boundary.measures:
            visit.leaf = value.requires_grad_()
        return value

    def _warn_of_detached(self, activation: Tensor) -> None:
        if not (activation.requires_grad or self._warned):
            self._warned = True
            warnings.warn(
                f"'{self.name}' is given an activation that no gradient flows back from, so that nothing before it "
                "trains. Take out the `detach` or `no_grad` before it, unless you mean it.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ and back

    def score(self, score: Any) -> Tensor:
        """See :class:`~lightning_sg.blackbox.boundary.Scoring`.

        Raises:
            BoundaryError: See :meth:`ScoredBoundary.loss`.
            NonFiniteLossError: If a score is NaN or infinite.
        """
        visits, self._visits = self._visits, []
        if not visits:
            raise BoundaryError(
                f"`loss` of '{self.name}' was called, but nothing has crossed the boundary since the step began or "
                "since the last call. Call the boundary first, and `loss` once for it."
            )
        self._scored += len(visits)
        device = visits[0].carrier.device
        with without_autocast(device.type):
            self._restore(device)
            self._learn_due(device)
            return self._later(visits, score) if are_coming(score) else self._now(visits, score)

    def _now(self, visits: list[Visit], score: Any) -> Tensor:
        estimator, evaluations = self.learning.estimator, visits[0].draw.evaluations
        for visit in visits:
            scores = checked_scores(score, self.name, visit.draw.activation, evaluations)
        if estimator.passes:
            return self._passed(scores)
        if scores.requires_grad and self._looked < _LOOKED_AT:
            self._looked += 1
            refuse_way_around(scores, [visit.carrier for visit in visits], self.name)
        known, kept = self._finite(scores.detach())
        examples = [visit.example(known) for visit in visits]
        if estimator.learns_first:
            self._learn(examples, kept)
        self.learning.prepare(examples[0])
        gradients: list[Tensor | None] = []
        for place, visit in enumerate(visits):
            rows = self.learning.gradient(visit.draw, visit.context, known, self.number, self._scored + place)
            gradients.append(visit.of_samples(rows if kept is None else rows * _beside(kept, rows)))
        if self._boundary.measures:
            self._measure(visits, scores, gradients)
        if not estimator.learns_first:
            self._learn(examples, kept)
        self._note(known if kept is None else known[kept])
        self._metrics["noise"] = visits[0].draw.spread.mean()
        left = scores if kept is None else scores[kept]
        return self._loss(left.mean() if len(left) else left.sum(), visits, gradients)

    def _passed(self, scores: Tensor) -> Tensor:
        """The cost whose own gradient goes through the boundary."""
        if not scores.requires_grad:
            raise BoundaryError(
                f"{type(self.learning.estimator).__name__} at '{self.name}' needs a cost that is differentiable by "
                "what the boundary returned, and this one carries no gradient. Use an estimator that learns from "
                "scores, such as Critic() or ScoreFunction()."
            )
        self._note(scores.detach())
        return scores.mean()

    def _later(self, visits: list[Visit], score: Any) -> Tensor:
        """The scores come later: goes on with what the estimator knows."""
        estimator = self.learning.estimator
        if estimator.needs_score or estimator.passes or self._boundary.measures:
            kind = type(estimator).__name__
            why = "measure=True compares with" if self._boundary.measures else f"{kind} needs"
            raise BoundaryError(
                f"`loss` of '{self.name}' was given scores that come later, but {why} those of the batch itself. "
                "Give it the scores (`future.result()`), or use Critic()."
            )
        first, draws = visits[0].draw, [(each.draw.activation, each.draw.value, each.context) for each in visits]
        pending = Pending(self.number, first.evaluations, draws, first.spread.tolist(), score)
        self.ledger.add(self.number, pending, self.number + 1 + self._options.delay, self._scored)
        gradients: list[Tensor | None] = [
            visit.of_samples(self.learning.gradient(visit.draw, visit.context, None, self.number, self._scored + place))
            if self.learning.ready
            else None
            for place, visit in enumerate(visits)
        ]
        mean = torch.zeros((), device=visits[0].carrier.device) if self._last_mean is None else self._last_mean
        return self._loss(mean, visits, gradients)

    def _loss(self, mean: Tensor, visits: list[Visit], gradients: list[Tensor | None]) -> Tensor:
        """The mean score, whose backward pass brings each activation its gradient."""
        samples = max(1, visits[0].carrier.shape[0])
        for gradient, visit in zip(gradients, visits):
            if visit.carrier.requires_grad:
                parts = None if gradient is None else (gradient,)
                mean = mean + inject(parts, [visit.carrier], samples, mean.dtype)
        return mean

    def _finite(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores, zero where they are not finite, and which rows are; ``None`` if all are."""
        kept = scores.reshape(scores.shape[0], -1).isfinite().all(1)
        if bool(kept.all()):
            return scores, None
        if not self._options.leaves_out:
            raise NonFiniteLossError(
                f"{int((~kept).sum())} of {len(kept)} scores of '{self.name}' are NaN or infinite (training batch "
                f"{self.number}). Bound what is given to the black box, or the cost; or leave such rows out: "
                "SyntheticGradients(on_non_finite='skip')."
            )
        return torch.where(_beside(kept, scores), scores, torch.zeros_like(scores)), kept

    def _measure(self, visits: list[Visit], scores: Tensor, gradients: list[Tensor | None]) -> None:
        """Compares with the true gradient, which goes no further."""
        leaves = [visit.leaf for visit in visits if visit.leaf is not None]
        found: tuple[Tensor | None, ...] = (None,)
        if scores.requires_grad:
            mean = scores.reshape(scores.shape[0], -1).mean(1).sum()
            found = torch.autograd.grad(mean, leaves, retain_graph=True, allow_unused=True)
        true = [visit.of_samples(part.float()) for visit, part in zip(visits, found) if part is not None]
        if len(true) < len(visits):
            raise BoundaryError(
                f"measure=True at '{self.name}' compares with the true gradient, but the score is no differentiable "
                "function of what the boundary returned. Use measure=False."
            )
        self._metrics.update(compare(tuple(part for part in gradients if part is not None), tuple(true)))

    # ------------------------------------------------------------------ learning

    def _learn(self, examples: list[Example], kept: Tensor | None) -> None:
        for place, example in enumerate(examples):
            rows = example if kept is None else example.chosen(kept)
            loss = self.learning.learn(rows, self.number, self._scored + place)
            if loss is not None:
                self._metrics["loss"] = loss

    def _learn_due(self, device: torch.device) -> None:
        """Learns from the scores that are due, waiting for them if necessary."""
        for pending in self.ledger.due(self.number):
            self._take(pending)
            assert pending.score is not None
            score, kept = self._finite(pending.score.to(device))
            self._note(score if kept is None else score[kept])
            draws = tree_map_only(Tensor, lambda part: part.to(device), pending.draws)
            self._learn([Example.of([*draw, score], pending.spread) for draw in draws], kept)

    def _take(self, pending: Pending) -> None:
        """Waits for the scores of a batch, if they have not come."""
        if pending.score is None:
            assert pending.coming is not None
            found = arrived(pending.coming, self.name, pending.batch)
            pending.score = checked_scores(found, self.name, pending.draws[0][0], pending.evaluations).detach()
            pending.coming = None

    def _note(self, scores: Tensor) -> None:
        if scores.shape[0]:
            self._last_mean = self._metrics["score"] = scores.mean()

    def take_metrics(self) -> dict[str, Tensor]:
        """The metrics of the last batch, once: scalars by name."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on exactly, with the scores that were still to come. A collective."""
        for pending in self.ledger:
            self._take(pending)
        state = {
            "learning": self.learning.state_dict(),
            "pending": [pending.state_dict() for pending in self.ledger] + self._restored,
            "mean": self._last_mean,
        }
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        saved["pending"] = self._options.replicas.join(saved["pending"], _samples_of)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; what needs a device with the next scores."""
        self.learning.load_state_dict(state["learning"])
        self._last_mean = state["mean"]
        self.ledger.clear()
        self._restored = self._options.replicas.share(state["pending"], _samples_of)

    def _restore(self, device: torch.device) -> None:
        self.learning.restore(device)
        restored, self._restored = self._restored, []
        if self._last_mean is not None:
            self._last_mean = self._last_mean.to(device)
        for place, entry in enumerate(restored):
            pending = Pending(**tree_map_only(Tensor, lambda tensor: tensor.to(device), entry))
            pending.draws = [tuple(draw) for draw in pending.draws]
            self.ledger.add(pending.batch, pending, pending.batch + 1 + self._options.delay, place)


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """Values for each row, of a shape that broadcasts."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def _samples_of(entry: dict[str, Any]) -> int:
    """The number of rows of saved scores that were still to come."""
    return int(entry["score"].shape[0])


__all__ = ["ScoredTrainer"]
