"""The boundary that follows a rule: nothing is predicted there and nothing learned."""

from __future__ import annotations

from typing import Any

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.replicas import Replicas
from lightning_sg.rules import BoundaryRule
from lightning_sg.training.base import BoundaryTrainer, Echo
from lightning_sg.training.record import Record, TargetPlan


class RuledBoundary(BoundaryTrainer):
    """Supplies the gradient of one boundary by a rule.

    Args:
        name: The boundary's name, for messages.
        rule: The rule.
        delay: Extra steps before a target is due; 0 means the next step.
        replicas: The replicas whose batches this boundary learns from together.
    """

    def __init__(self, name: str, rule: BoundaryRule, delay: int, replicas: Replicas) -> None:
        super().__init__(name, delay, replicas)
        self._rule = rule
        self._ready = False

    @property
    def described(self) -> str:
        """The name of the rule."""
        return type(self._rule).__name__

    @property
    def late_share(self) -> float:
        """See :attr:`BoundaryTrainer.late_share`."""
        return self._rule.late_share(self.distance)

    @property
    def waits(self) -> bool:
        """See :attr:`BoundaryTrainer.waits`."""
        return self._rule.waits

    @property
    def needs_true_gradient(self) -> bool:
        """See :attr:`BoundaryTrainer.needs_true_gradient`."""
        return self._rule.waits or self.late_share > 0

    def wants_exact(self, context: Any) -> bool:
        """Never: there is nothing to learn."""
        return False

    def told(self, context: Any) -> Any:
        """Nothing."""
        return None

    @property
    def ready(self) -> bool:
        """See :attr:`BoundaryTrainer.ready`."""
        return self._ready

    def prepare(self, inputs: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Puts the saved batches back under way.

        Raises:
            SyntheticGradientsError: If they were saved with a predictor.
        """
        self._ready = True
        state, self._restored = self._restored, None
        if state is None:
            return
        if state.get("predictor"):  # earlier versions saved an empty one for a rule
            raise SyntheticGradientsError(
                f"The checkpoint has a predictor for boundary '{self.name}', where {self.described} is configured now. "
                "Resume with the predictor of the saved run."
            )
        self._restore_batches(state["pending"], inputs[0].device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`BoundaryTrainer.load_state_dict`."""
        super().load_state_dict(state)
        self._ready = False

    def _asks(self, plan: TargetPlan, step: int) -> tuple[bool, bool]:
        return plan.exact or plan.coupled or self.waits or self.late_share > 0, False

    def _predict(self, record: Record) -> Gradients | None:
        return None

    def _learn(self, record: Record, echo: Echo | None = None) -> None:
        if not record.empty:
            self._best_target(record)

    def _own_state(self) -> dict[str, Any]:
        return {"rule": self.described}


__all__ = ["RuledBoundary"]
