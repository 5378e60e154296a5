"""Clips by value where an optimizer has no gradients, which torch refuses."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class ClippingByValue:
    """Takes the place of a precision plugin's ``clip_grad_by_value``.

    An optimizer has no gradients in a step that its stages leave out, and in a process whose stages are given none.

    Args:
        plugin: The precision plugin.
    """

    def __init__(self, plugin: Any) -> None:
        self._clip = plugin.clip_grad_by_value

    def __call__(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips the gradients that there are."""
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            self._clip(optimizer, clip_val)

    @classmethod
    def install(cls, plugin: Any) -> None:
        """Puts it in the plugin's method's place, once."""
        if not isinstance(plugin.clip_grad_by_value, cls):
            plugin.clip_grad_by_value = cls(plugin)


__all__ = ["ClippingByValue"]
