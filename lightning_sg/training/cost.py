"""How many floating-point operations something takes, the backward passes in it included."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import flop_registry

from lightning_sg._compat import TorchDispatchMode


class OperationCounter(TorchDispatchMode):
    """Counts while entered, as torch's ``FlopCounterMode`` does.

    That one follows modules with hooks on gradients, which ``torch.autograd.grad`` refuses inside of predictors.

    Attributes:
        flops: What was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        return result


__all__ = ["OperationCounter"]
