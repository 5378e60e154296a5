"""What stages still have to apply of past batches, once their exact gradients have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.crossings.scale import GradientScale
from lightning_sg.training.ledger import Ledger

Gradient = Mapping[str, Tensor]


class Corrections:
    """Gradients of parameters that are due some batches after their own: exact ones, or exact minus used ones.

    They are computed with the weights of their own batch.
    """

    def __init__(self) -> None:
        self._ledger: Ledger[list[Gradient]] = Ledger()

    def due(self, now: int) -> set[str]:
        """The names of the parameters for which something is due at batch ``now``."""
        steps = [step for step in self._ledger.steps() if step <= now]
        return {name for step in steps for gradients in self._ledger[step] for name in gradients}

    def hold(self, due: int, gradients: Gradient) -> None:
        """Keeps gradients of the mean loss, by parameter name, until batch ``due``."""
        if not gradients:
            return
        if due not in self._ledger:
            self._ledger.add(due, [], due)
        self._ledger[due].append(gradients)

    @torch.no_grad()
    def apply(self, module: nn.Module, now: int, scale: GradientScale, holds: Callable[[str], bool]) -> None:
        """Adds what is due to the parameters' ``.grad``.

        Args:
            module: Its parameters.
            now: The number of the current batch.
            scale: The factor on the gradients of the current backward pass.
            holds: Whether this process trains the parameter of that name.
        """
        ready = [gradients for held in self._ledger.due(now) for gradients in held]
        if not ready:
            return
        parameters = dict(module.named_parameters())
        for gradients in ready:
            for name, gradient in gradients.items():
                parameter = parameters.get(name)
                if parameter is None or not parameter.requires_grad or not holds(name):
                    continue
                gradient = (gradient.to(parameter.device) * scale.factor).to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def state_dict(self) -> dict[str, Any]:
        """What is held, by due batch and parameter: disjoint between processes."""
        state: dict[str, Any] = {}
        for due in self._ledger.steps():
            for gradients in self._ledger[due]:
                for name, gradient in gradients.items():
                    key = f"{due}:{name}"
                    new = gradient.detach().cpu()
                    state[key] = state[key] + new if key in state else new.clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._ledger.clear()
        for key, gradient in state.items():
            due, name = key.split(":", 1)
            self.hold(int(due), {name: gradient})


__all__ = ["Corrections", "Gradient"]
