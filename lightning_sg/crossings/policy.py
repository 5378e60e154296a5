"""When exact gradients travel, to which parameters they are applied, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sg.crossings.corrections import Corrections
from lightning_sg.crossings.exact_pass import Parameters
from lightning_sg.crossings.late import FallingRate, late_policy
from lightning_sg.crossings.newest import NewestGradient
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.options import ExactGradients, LateGradients
from lightning_sg.partition.trace import Trace
from lightning_sg.replicas import Replicas
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.record import Applied, TargetPlan

#: Whether this process trains the parameter of that name.
Holds = Callable[[str], bool]


class ExactPolicy:
    """Decides for each batch what it does about targets, and holds late gradients until they are due.

    Attributes:
        rate: How far the model's learning rate has fallen, if a mixture goes by that.

    Args:
        options: What the user said of exact gradients.
        late: What the user said of late gradients, or ``None``.
        module: The model.
        trainers: What supplies the gradient at each boundary between stages.
        replicas: The replicas whose late gradients are averaged.
    """

    def __init__(
        self,
        options: ExactGradients,
        late: LateGradients | None,
        module: nn.Module,
        trainers: Mapping[str, BoundaryTrainer],
        replicas: Replicas,
    ) -> None:
        self._options = options
        # Distances from the end are not known before the first step of a resumed run has been traced.
        self.rate = FallingRate(max((len(trainers) * (1 + each.delay) for each in trainers.values()), default=0))
        self._late = late_policy(options, late, trainers, self.rate)
        self._module = module
        self._trainers = trainers
        self._replicas = replicas
        self._trace: Trace | None = None
        self._corrections = Corrections()

    def accept(self, trace: Trace) -> None:
        """Takes a traced step, which says to which stage a parameter belongs."""
        self._trace = trace

    def begin(self, number: int, optimizers: Iterable[Optimizer]) -> None:
        """Training batch ``number`` begins, which the model's optimizers are to step for."""
        self._late.begin(number, optimizers)

    def plan(self, number: int, context: Any) -> TargetPlan:
        """What training batch ``number`` does about targets.

        Decided again once the first step has been traced: what crosses the boundaries has a say in it.
        """
        teaches = self._teaches(context)
        sent = teaches or self._late.ever
        number -= self._options.warm_up
        coupled = number < 0
        applies = Applied.NOTHING if coupled else self._late.applies(number)
        turn = teaches and number % self._options.every == 0
        exact = not coupled and (turn or applies is not Applied.NOTHING)
        # A head that matches the exact gradient of every batch gets no better: where true gradients vanish, as in deep
        # networks without normalisation, it loses sight of its own loss.
        return TargetPlan(
            exact=exact,
            teaches=turn or not self._late.whole,
            local=self._late.whole and not teaches,
            bootstrap=not sent,
            coupled=coupled,
            corrects=self.applies_late,
            applies=applies,
        )

    def _teaches(self, context: Any) -> bool:
        """Whether exact gradients travel for predictors to learn from."""
        wanted = any(each.wants_exact(context) for each in self._trainers.values())
        return self._options.every > 0 and len(self._trainers) > 1 and wanted

    @property
    def applies_late(self) -> bool:
        """Whether any stage applies exact gradients when they arrive."""
        return self._late.ever

    # ------------------------------------------------------------------ late gradients

    def applied(self, applies: Applied, holds: Holds) -> Parameters:
        """The parameters of this process's stages that such an exact gradient is applied to, by name."""
        if applies is Applied.NOTHING:
            return {}
        return {name: part.parameter for name, part in self._parts(holds).items()}

    def of_stage(self, boundary: str, holds: Holds) -> Parameters:
        """The parameters of this process's stage before a boundary that late gradients are applied to, by name."""
        return {name: part.parameter for name, part in self._parts(holds).items() if part.boundary == boundary}

    def trainer(self, boundary: str) -> BoundaryTrainer:
        """What supplies the gradient at a boundary."""
        return self._trainers[boundary]

    def delay(self, boundary: str) -> int:
        """How many batches later than its own an exact gradient is applied in the stage before a boundary."""
        return self._trainers[boundary].age

    def neighbour(self, boundary: str, steps: int) -> str | None:
        """The boundary so many further towards the loss, or before if that is negative, if there is one."""
        order = [] if self._trace is None else self._trace.order
        place = order.index(boundary) + steps if boundary in order else -1
        return order[place] if 0 <= place < len(order) else None

    def from_the_end(self, boundaries: Iterable[str]) -> list[str]:
        """Boundaries in order, the last first."""
        return sorted(boundaries, key=lambda name: self._trainers[name].distance)

    def hold(self, number: int, gradients: Mapping[str, Tensor], holds: Holds) -> None:
        """Keeps what is to be applied of batch ``number`` until it is due: the later, the further from the loss."""
        averaged = dict(zip(gradients, self._replicas.average(list(gradients.values()))))
        by_due: dict[int, dict[str, Tensor]] = {}
        for name, part in self._parts(holds).items():
            if name in averaged:
                weight = self._late.weight(part.trainer, number)
                gradient = averaged[name] if weight == 1 else weight * averaged[name]
                by_due.setdefault(number + part.delay, {})[name] = gradient
        for due, held in by_due.items():
            self._corrections.hold(due, held)

    def newest(self, now: int, holds: Holds) -> NewestGradient:
        """What the gradient of batch ``now`` itself counts: less, where something late is due."""
        if not self._late.ever:
            return NewestGradient()
        due = self._corrections.due(now)
        parts = [part for name, part in self._parts(holds).items() if name in due]
        weights = [(part.parameter, self._late.newest(part.trainer, now - part.delay)) for part in parts]
        return NewestGradient([(parameter, weight) for parameter, weight in weights if weight != 1])

    def apply(self, now: int, scale: GradientScale, holds: Holds) -> None:
        """Applies what is due at batch ``now``."""
        self._corrections.apply(self._module, now, scale, holds)

    def _parts(self, holds: Holds) -> dict[str, _LatePart]:
        """What is applied late to each parameter of this process."""
        trace, late = self._trace, self._late
        if trace is None or not late.ever:
            return {}
        if not trace.order:
            raise SyntheticGradientsError(
                "Late gradients need to know which stage a parameter belongs to, but the step could not be followed on "
                "tensors without data (see the warning at the start). Use no LateGradients, correction=0 and no "
                "DelayedGradient with this model, or move the code that reads values behind the last boundary."
            )
        found = {}
        for name, parameter in self._module.named_parameters():
            users = trace.uses.get(name)
            if not users or min(users) == len(trace.order) or not parameter.requires_grad or not holds(name):
                continue
            boundary = trace.order[min(users)]
            if late.concerns(self._trainers[boundary]):
                found[name] = _LatePart(parameter, boundary, self._trainers[boundary], self.delay(boundary))
        return found

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is held: disjoint between processes."""
        return self._corrections.state_dict()

    def load_state_dict(self, state: dict[str, Any], rate: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`, and the state of the rate."""
        self._corrections.load_state_dict(state)
        self.rate.load_state_dict(rate)


@dataclass(frozen=True)
class _LatePart:
    """What is applied late to a parameter.

    Attributes:
        parameter: The parameter.
        boundary: That at the end of its stage.
        trainer: What supplies the gradient there.
        delay: How many batches later than its own it is due.
    """

    parameter: nn.Parameter
    boundary: str
    trainer: BoundaryTrainer
    delay: int


__all__ = ["ExactPolicy", "Holds"]
