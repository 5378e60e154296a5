"""Counts the work of operations: their arithmetic, and the memory that they read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg._compat import TorchDispatchMode, tree_leaves

Result = TypeVar("Result")

#: How many floating-point operations of a matrix product take as long as it takes to read or write one byte. A core of
#: a processor does 80 GFLOP/s and moves 10 GB/s (measured, float32). A GPU with tensor cores does more for each byte:
#: an A100 some 150 TFLOP/s at 1.5 TB/s, about half of what its data sheet promises of both.
_OPERATIONS_A_BYTE = {"cpu": 8.0}
_ON_OTHERS = 100.0
#: What an optimizer such as Adam reads and writes for each parameter in float32: parameter, gradient and two averages
#: in, all but the gradient out.
_BYTES_OF_UPDATE = 28

_aten = torch.ops.aten
#: Operations that read only what they return of a tensor which may be far larger.
_PICKS = frozenset(
    {
        _aten.embedding,
        _aten.index,
        _aten.index_select,
        _aten.gather,
        _aten.take,
        _aten.take_along_dim,
        _aten._unsafe_index,
    }
)
#: Operations that move nothing, besides those that torch knows as views.
_MOVES_NOTHING = frozenset(
    {_aten.detach, _aten.alias, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
)


@dataclass(frozen=True)
class Work:
    """Some work.

    Attributes:
        flops: Floating-point operations, as torch counts them: those of matrix products, convolutions and attention.
        bytes: Bytes that all operations read and wrote.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Work) -> Work:
        """What is left of it without the other."""
        return Work(self.flops - other.flops, self.bytes - other.bytes)

    def __mul__(self, times: float) -> Work:
        """So many times as much."""
        return Work(self.flops * times, self.bytes * times)

    def on(self, kind: str) -> float:
        """The floating-point operations that take as long on a device.

        Args:
            kind: The kind of device: ``"cpu"``, ``"cuda"``.
        """
        return self.flops + self.bytes * _OPERATIONS_A_BYTE.get(kind, _ON_OTHERS)


@dataclass(frozen=True)
class StageWork:
    """The work of a stage in one step, without the optimizer.

    Attributes:
        forward: Of the forward pass.
        step: Of forward and backward pass.
    """

    forward: Work
    step: Work

    def __mul__(self, times: float) -> StageWork:
        """Of so many passes."""
        return StageWork(self.forward * times, self.step * times)


def work_of_update(parameters: float) -> Work:
    """The work of an optimizer step on so many parameters; its arithmetic does not count beside what it moves."""
    return Work(bytes=parameters * _BYTES_OF_UPDATE)


def bytes_moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """The bytes that an operation of torch reads and writes, if it works as a kernel of its own.

    Args:
        func: The operation, as a dispatch mode gets it.
        args: Its arguments.
        kwargs: Its arguments by name.
        result: What it returned.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet is None or getattr(func, "is_view", False) or packet in _MOVES_NOTHING:
        return 0
    written = _size(tree_leaves(result))
    return 2 * written if packet in _PICKS else written + _size(tree_leaves((args, kwargs)))


def _size(leaves: Iterable[Any]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


class WorkCounter(AbstractContextManager["WorkCounter"]):
    """Counts the work of a step that runs on fake tensors, while entered.

    Attributes:
        forward: The work so far, without backward passes.
        step: The work of the calls so far with what their backward passes will take; see :meth:`call`.
    """

    def __init__(self) -> None:
        self.step = Work()
        self._arithmetic = FlopCounterMode(display=False)
        self._memory = _Memory()

    @property
    def forward(self) -> Work:
        """See above."""
        return Work(self._arithmetic.get_total_flops(), self._memory.moved)

    def __enter__(self) -> Self:
        self._arithmetic.__enter__()
        self._memory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.__exit__(kind, error, trace)
        self._arithmetic.__exit__(kind, error, trace)

    def call(self, run: Callable[[], Result], trained: Sequence[Tensor]) -> Result:
        """Runs one call of the step's code, and estimates what its backward pass will take.

        Going backward, a matrix product is computed once for each of its two operands that needs a gradient: a first
        layer needs none of its input, and a frozen one none of its weight. Other operations move about twice as much as
        forward.

        Args:
            run: The call.
            trained: What it is given that needs a gradient.
        """
        before = self.forward
        result = run()
        done = self.forward - before
        if done.flops or done.bytes:
            operands = min(2, sum(tensor.ndim > 1 for tensor in trained))  # a bias is none
            self.step += Work(done.flops * (1 + operands), done.bytes * (3 if trained else 1))
        return result


class _Memory(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.moved += bytes_moved(func, args, kwargs, result)
        return result


__all__ = ["StageWork", "Work", "WorkCounter", "bytes_moved", "work_of_update"]
