"""What hooks are given in the place of a loss and outputs that only the last stage has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What may be asked of a tensor without a look at its value.
_HARMLESS = {
    "detach", "detach_", "clone", "to", "cpu", "cuda", "float", "double", "half", "bfloat16", "size", "dim", "numel",
    "is_floating_point", "is_complex", "requires_grad_", "__repr__", "element_size", "ndimension", "type", "get_device",
    "__hash__", "is_contiguous", "squeeze", "unsqueeze", "view", "reshape", "retain_grad", "__deepcopy__",
    "untyped_storage",
}  # fmt: skip


class ElsewhereError(RuntimeError):
    """Something was read that another stage has."""


class LossElsewhere(Tensor):
    """Stands for the loss in a stage that has none: an error says so when its value is read."""

    @staticmethod
    def at(device: torch.device) -> LossElsewhere:
        """Makes one.

        Args:
            device: The device that it is on.
        """
        return torch.full((), torch.nan, device=device).as_subclass(LossElsewhere)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lets through what does not look at the value.

        Raises:
            ElsewhereError: For all else.
        """
        name = getattr(func, "__name__", "")
        if name == "__repr__":
            return "LossElsewhere(known in the last stage)"
        if name in _HARMLESS or name in ("__get__", "__set__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise ElsewhereError("the loss is known in the last stage only")


class OutputsElsewhere(dict[str, Any]):
    """The outputs of a step in a stage that has none: an error says so when one of them is read."""

    def __missing__(self, key: str) -> Any:
        """Raises.

        Raises:
            ElsewhereError: Always.
        """
        raise ElsewhereError(f"the output '{key}' of the step is known in the last stage only")

    def get(self, key: str, default: Any = None) -> Any:
        """Raises unless the key is there."""
        return self[key]


def in_place_of(outputs: Any, device: torch.device) -> Any:
    """What a hook is given for the loss or the outputs of a training step.

    Args:
        outputs: What Lightning has: of a stage without a loss, the surrogate whose backward pass trains it.
        device: The device of the loss.
    """
    if isinstance(outputs, Tensor):
        return LossElsewhere.at(device)
    if not isinstance(outputs, dict):
        return outputs
    loss = {"loss": LossElsewhere.at(device)} if "loss" in outputs else {}
    return OutputsElsewhere(loss)


__all__ = ["ElsewhereError", "LossElsewhere", "OutputsElsewhere", "in_place_of"]
