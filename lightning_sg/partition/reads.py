"""Notices whether a call reads values of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_sg._compat import TorchDispatchMode
from lightning_sg.partition.fake_mode import values_deciding

#: They read values without an operation that could be seen.
_OUT_OF_SIGHT = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_VALUE_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Reads(AbstractContextManager["Reads"]):
    """Notices values that are read inside the context: numbers, or sizes that depend on values.

    Attributes:
        any: Whether there were any.
    """

    def __init__(self) -> None:
        self.any = False
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()


class _Functions(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._reads.any = self._reads.any or func in _OUT_OF_SIGHT
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        deciding = values_deciding(func, args, kwargs)
        if deciding or (deciding is None and any(tag in func.tags for tag in _VALUE_TAGS)):
            self._reads.any = True
        return func(*args, **kwargs)


__all__ = ["Reads"]
