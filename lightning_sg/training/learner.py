"""One predictor with its optimizer: built once its sizes are known, then trained batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sg._compat import tree_leaves
from lightning_sg.predictors.base import GradientPredictor, Gradients, Predictor
from lightning_sg.predictors.layout import Layout
from lightning_sg.replicas import Replicas
from lightning_sg.rng import seeded

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Kind = TypeVar("Kind", bound=Predictor)


class Learner(Generic[Kind]):
    """A predictor that learns.

    The learner passes sizes, inputs and examples on as they are, but for the order of the dimensions of sequences: the
    predictor defines them.

    Attributes:
        layout: That order, in what comes first among them, in targets, and in predictions.

    Args:
        template: An unbuilt predictor; it is copied.
        make_optimizer: Makes the optimizer from the predictor's parameters; ``None`` for the predictor's own choice.
        make_scheduler: Makes a learning-rate schedule, stepped after every batch learned from; ``None`` for none.
        updates: The number of optimizer steps for each batch.
        ema: Decay of an exponential moving average of the parameters, which then predicts; 0 for none.
        seed: Seeds the initial weights.
        replicas: The replicas whose predictors at this boundary stay equal.
    """

    def __init__(
        self,
        template: Kind,
        make_optimizer: OptimizerFactory | None,
        make_scheduler: SchedulerFactory | None = None,
        *,
        updates: int = 1,
        ema: float = 0.0,
        seed: int = 0,
        replicas: Replicas | None = None,
    ) -> None:
        self.predictor = self._template = template
        self.built = False
        self.layout = Layout()
        self._make_optimizer = make_optimizer
        self._make_scheduler = make_scheduler
        self._updates = updates
        self._ema = ema
        self._seed = seed
        self._replicas = replicas or Replicas()
        self._restarts = 0
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._average: Kind | None = None

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return self._optimizer is not None

    @property
    def learns_in_passing(self) -> bool:
        """Whether the predictor can learn in the pass in which it predicts; a moving average predicts in its own."""
        predictor = self.predictor
        passing = isinstance(predictor, GradientPredictor) and predictor.learns_in_passing
        return passing and self.learns and self._average is None

    def take_template(self, template: Kind) -> None:
        """Takes another unbuilt predictor, from which the next :meth:`build` makes its copy."""
        self.predictor = self._template = template

    def build(self, *sizes: Any) -> None:
        """Makes the parameters, on the device of the first tensor in ``sizes``, and uses up no random numbers."""
        device: torch.device = tree_leaves(sizes)[0].device
        self.predictor = copy.deepcopy(self._template)
        with seeded(self._seed + self._restarts, device):
            self.predictor.build(*self._turned(sizes))
        self.predictor.to(device)
        self.predictor.train()
        # The initial values may depend on the batch, which differs between replicas.
        self._replicas.average_(_floating([*self.predictor.parameters(), *self.predictor.buffers()]))
        parameters = [parameter for parameter in self.predictor.parameters() if parameter.requires_grad]
        make_optimizer = self._make_optimizer or self.predictor.default_optimizer
        self._optimizer = make_optimizer(parameters) if parameters else None
        if self._optimizer is not None and self._make_scheduler is not None:
            self._scheduler = self._make_scheduler(self._optimizer)
        self._average = copy.deepcopy(self.predictor) if self._ema and parameters else None
        self.built = True

    def restart(self, *sizes: Any) -> None:
        """Starts again from other initial weights, after the predictor was not finite."""
        self._restarts += 1
        self.build(*sizes)

    def tell_scale(self, rms: Tensor | None) -> None:
        """Tells the predictor the usual size of its targets."""
        for predictor in (self.predictor, self._average):
            if predictor is not None:
                predictor.target_rms = rms

    def predict(self, *inputs: Any) -> Gradients | None:
        """The per-sample prediction, detached."""
        with torch.no_grad():
            prediction: Gradients | None = (self._average or self.predictor)(*self._turned(inputs))
        return None if prediction is None else self.layout.turned(tuple(part.detach() for part in prediction))

    def predict_in_passing(self, activations: Gradients, context: Any) -> tuple[Gradients, Tensor]:
        """The per-sample prediction and the predictor's own loss; its gradients stay in the parameters."""
        assert isinstance(self.predictor, GradientPredictor)
        prediction, loss = self.predictor.forward_and_backward(self.layout.turned(activations), context)
        return self.layout.turned(prediction), loss

    def learn(self, *example: Any) -> Tensor:
        """Trains on one batch, if there are parameters; returns the last loss."""
        loss = self._update(example, self._updates)
        self._end_batch()
        return loss

    def learn_in_passing(self, *example: Any) -> None:
        """Trains on one batch, by the gradients that are in the parameters since the prediction for it."""
        self._step()
        if self._updates > 1:
            self._update(example, self._updates - 1)
        self._end_batch()

    def _update(self, example: tuple[Any, ...], times: int) -> Tensor:
        loss, example = torch.zeros(()), self._turned(example)
        for _ in range(times):
            with torch.enable_grad():
                loss = self.predictor.loss(*example)
                if self._optimizer is not None:
                    self._optimizer.zero_grad()
                    loss.backward()
            self._step()
        return loss.detach()

    def _turned(self, example: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs, and targets where there are some, in the predictor's order of dimensions."""
        if not self.layout.channels_second:
            return example
        inputs, context, *others = example
        targets = (self.layout.turned(each) if isinstance(each, tuple) else each for each in others)
        return (self.layout.turned(inputs), context, *targets)

    def _step(self) -> None:
        """Takes one step of the optimizer, alike in all replicas."""
        if self._replicas.count > 1:
            gradients = [p.grad for p in self.predictor.parameters() if p.grad is not None]
            self._replicas.average_([*gradients, *_floating(self.predictor.buffers())])
        if self._optimizer is not None:
            self._optimizer.step()

    def _end_batch(self) -> None:
        if self._scheduler is not None:
            self._scheduler.step()
        if self._average is not None:
            with torch.no_grad():
                pairs = zip(self._average.state_dict().values(), self.predictor.state_dict().values())
                for average, value in pairs:
                    if average.is_floating_point():
                        average.lerp_(value, 1 - self._ema)
                    else:
                        average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {
            "predictor": self.predictor.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "restarts": self._restarts,
        }

    def kinds(self) -> dict[str, str | None]:
        """The classes of the optimizer and its schedule, saved to tell what a resumed run has changed."""
        return {"optimizer_kind": _kind(self._optimizer), "scheduler_kind": _kind(self._scheduler)}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Restores :meth:`state_dict`, perhaps with :meth:`kinds` in it, after :meth:`build`.

        Returns:
            What of it is not used, or starts afresh, as sentences: parts that are set up otherwise now.

        Raises:
            RuntimeError: If the state is that of another predictor.
        """
        self.predictor.load_state_dict(state["predictor"])
        remarks = [
            *self._restore_part("optimizer", self._optimizer, state),
            *self._restore_part("scheduler", self._scheduler, state),
        ]
        if self._average is not None:
            self._average.load_state_dict(state["average"] or state["predictor"])
        elif state["average"]:
            remarks.append("the moving average of the predictor's parameters is dropped")
        self._restarts = state["restarts"]
        return remarks

    def _restore_part(self, part: str, now: Optimizer | LRScheduler | None, state: dict[str, Any]) -> list[str]:
        """Restores the optimizer or its schedule, if it is of the kind that was saved."""
        saved, kind = state[part], state.get(f"{part}_kind")  # earlier versions did not save the kind
        if now is None or saved is None:
            change = "is dropped" if now is None else "starts afresh"
            return [] if now is saved else [f"the predictor's {part} {change}"]
        if kind in (None, _kind(now)):
            fresh = copy.deepcopy(now.state_dict())
            with suppress(ValueError):  # of optimizers with other parameter groups
                now.load_state_dict(saved)
                if kind or not isinstance(now, Optimizer) or _complete(now):
                    return []
            now.load_state_dict(fresh)
        return [f"the predictor's {part} starts afresh: it was {kind or 'another'} and is {_kind(now)} now"]


def _kind(part: Optimizer | LRScheduler | None) -> str | None:
    return None if part is None else type(part).__name__


def _complete(optimizer: Optimizer) -> bool:
    """Whether its groups have all of its options; without one, a step would fail."""
    return all(optimizer.defaults.keys() <= group.keys() for group in optimizer.param_groups)


def _floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that replicas can average: no counters and no flags."""
    return [tensor for tensor in tensors if tensor.is_floating_point()]


__all__ = ["Learner", "OptimizerFactory", "SchedulerFactory"]
