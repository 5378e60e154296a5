"""When exact gradients travel, which parameters they correct, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_sg.crossings.corrections import Corrections
from lightning_sg.crossings.exact_pass import Parameters
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.options import ExactGradients
from lightning_sg.partition.trace import Trace
from lightning_sg.replicas import Replicas
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.record import TargetPlan

#: Whether this process trains the parameter of that name.
Holds = Callable[[str], bool]


class ExactPolicy:
    """Decides for each batch what it does about targets, and holds corrections until they are due.

    Args:
        options: What the user said of exact gradients.
        module: The model.
        trainers: What supplies the gradient at each boundary between stages.
        replicas: The replicas whose corrections are averaged.
    """

    def __init__(
        self,
        options: ExactGradients,
        module: nn.Module,
        trainers: Mapping[str, BoundaryTrainer],
        replicas: Replicas,
    ) -> None:
        self._options = options
        self._module = module
        self._trainers = trainers
        self._replicas = replicas
        self._trace: Trace | None = None
        self._corrections = Corrections()

    def accept(self, trace: Trace) -> None:
        """Takes a traced step, which says to which stage a parameter belongs."""
        self._trace = trace

    def plan(self, number: int, context: Any) -> TargetPlan:
        """What training batch ``number`` does about targets.

        Decided again once the first step has been traced: what crosses the boundaries has a say in it.
        """
        options = self._options
        sent = self._sends_exact(context)
        number -= options.warm_up
        coupled = number < 0
        exact = sent and not coupled and (self.applies_late or number % options.every == 0)
        return TargetPlan(exact=exact, bootstrap=not sent, coupled=coupled, corrects=self.corrects)

    def _sends_exact(self, context: Any) -> bool:
        """Whether exact gradients travel at all, on whichever batches."""
        if self.applies_late:
            return True
        useful = len(self._trainers) > 1 and any(each.wants_exact(context) for each in self._trainers.values())
        return self._options.every > 0 and (useful or self._options.correction > 0)

    @property
    def applies_late(self) -> bool:
        """Whether a boundary applies every batch's true gradient when it arrives."""
        return any(trainer.late_share > 0 for trainer in self._trainers.values())

    @property
    def corrects(self) -> bool:
        """Whether any stage is corrected by exact gradients."""
        return self._options.correction > 0 or self.applies_late

    # ------------------------------------------------------------------ corrections

    def corrected(self, holds: Holds) -> Parameters:
        """The parameters of this process's stages that exact gradients correct, by name."""
        return {name: correction.parameter for name, correction in self._due(holds).items()}

    def hold(self, number: int, gradients: Mapping[str, Tensor], holds: Holds) -> None:
        """Keeps corrections of batch ``number`` until they are due: the later, the further from the loss."""
        averaged = dict(zip(gradients, self._replicas.average(list(gradients.values()))))
        by_due: dict[int, dict[str, Tensor]] = {}
        for name, correction in self._due(holds).items():
            if name in averaged:
                gradient = averaged[name] if correction.weight == 1 else correction.weight * averaged[name]
                by_due.setdefault(number + correction.delay, {})[name] = gradient
        for due, held in by_due.items():
            self._corrections.hold(due, held)

    def apply(self, now: int, scale: GradientScale, holds: Holds) -> None:
        """Applies the corrections that are due at batch ``now``: exact minus used gradient."""
        self._corrections.apply(self._module, now, scale, holds)

    def _due(self, holds: Holds) -> dict[str, _Correction]:
        """How each parameter of this process is corrected."""
        trace, trainers = self._trace, self._trainers
        if trace is None or not self.corrects:
            return {}
        if not trace.order:
            raise SyntheticGradientsError(
                "Corrections with the true gradient need to know which stage a parameter belongs to, but the step "
                "could not be followed on tensors without data (see the warning at the start). Use correction=0 and "
                "no DelayedGradient with this model, or move the code that reads values behind the last boundary."
            )
        found = {}
        for name, parameter in self._module.named_parameters():
            users = trace.uses.get(name)
            if not users or min(users) == len(trace.order) or not parameter.requires_grad or not holds(name):
                continue
            trainer = trainers[trace.order[min(users)]]
            weight = trainer.late_share or self._options.correction
            if weight:
                found[name] = _Correction(parameter, trainer.distance * (1 + trainer.delay), weight)
        return found

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is held: disjoint between processes."""
        return self._corrections.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._corrections.load_state_dict(state)


@dataclass(frozen=True)
class _Correction:
    """How a parameter is corrected.

    Attributes:
        parameter: The parameter.
        delay: How many batches later than its own the correction is due.
        weight: What it is multiplied by.
    """

    parameter: nn.Parameter
    delay: int
    weight: float


__all__ = ["ExactPolicy", "Holds"]
