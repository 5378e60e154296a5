"""Gradients of parameters that are applied some steps after their batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Corrections:
    """What stages still have to apply of past batches: the exact gradient less the one that was used.

    What a stage applies of a batch in total is then the exact gradient, a part of it late. That part is computed with
    the weights of its own batch.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, dict[str, Tensor]]] = []

    def hold(self, due: int, gradients: dict[str, Tensor]) -> None:
        """Keeps gradients of the mean loss, by parameter name, until batch ``due``."""
        if gradients:
            self._held.append((due, gradients))

    @torch.no_grad()
    def apply(self, module: nn.Module, now: int, scale: Tensor | float, holds: Callable[[str], bool]) -> None:
        """Adds what is due to the parameters' ``.grad``.

        Args:
            module: Its parameters.
            now: The number of the current batch.
            scale: The factor on the gradients of the current backward pass.
            holds: Whether this process trains the parameter of that name.
        """
        ready = [gradients for due, gradients in self._held if due <= now]
        if not ready:
            return
        self._held = [(due, gradients) for due, gradients in self._held if due > now]
        parameters = dict(module.named_parameters())
        for gradients in ready:
            for name, gradient in gradients.items():
                parameter = parameters.get(name)
                if parameter is None or not parameter.requires_grad or not holds(name):
                    continue
                gradient = (gradient.to(parameter.device) * scale).to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def state_dict(self) -> dict[str, Any]:
        """What is held, by due batch and parameter: disjoint between processes."""
        state: dict[str, Any] = {}
        for due, gradients in self._held:
            for name, gradient in gradients.items():
                key = f"{due}:{name}"
                new = gradient.detach().cpu()
                state[key] = state[key] + new if key in state else new.clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        held: dict[int, dict[str, Tensor]] = {}
        for key, gradient in state.items():
            due, name = key.split(":", 1)
            held.setdefault(int(due), {})[name] = gradient
        self._held = sorted(held.items())


__all__ = ["Corrections"]
