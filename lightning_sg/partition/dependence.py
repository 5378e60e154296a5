"""Sees what code does with weights and gradients of which a process has its own alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_sg._compat import tree_leaves
from lightning_sg.partition.fakes import is_fake

# What this package does with weights and gradients is in order.
_PACKAGE = str(Path(__file__).parents[1])
# Functions that bring values to the host, or keep them there.
_READS = {
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero", "__float__", "__int__", "__bool__",
    "__index__", "__array__", "__format__", "__reduce_ex__", "__complex__",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Where the weights are that code may come upon.

    Attributes:
        elsewhere: For the address of each that is old here, as another process trains it, its name.
        foreign: The addresses of all that belong to another process: what is written to them there is what counts.
        own: For the address of each that belongs to this process, its name.
        trained: The ids of the parameters that only other processes have gradients for.
    """

    elsewhere: Mapping[int, str]
    foreign: frozenset[int]
    own: Mapping[int, str]
    trained: frozenset[int]


@dataclass
class Found:
    """What was found.

    Attributes:
        weights: The names of weights of other processes that were read.
        gradients: Whether something depends on the gradients of several parameters, among which others are not here.
    """

    weights: list[str] = field(default_factory=list)
    gradients: bool = False


@dataclass(frozen=True)
class _Gradient:
    """The gradient of a parameter of this process, and the code that asked for it."""

    name: str
    code: CodeType


_Source = str | _Gradient


class Dependence(TorchFunctionMode):
    """While entered, follows the weights of other processes, and gradients, through all operations of torch.

    To write to a weight of another process is harmless, as that one does so itself; an average in the place of its
    original is kept so. What counts is a value that is read, is written to what belongs to this process, or is kept.

    Attributes:
        paused: How often :func:`unwatched` is entered.
        touched: Whether the code has come upon a weight of another process, or a gradient.

    Args:
        weights: Where the weights are.
    """

    paused = 0

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights
        self._gradients: dict[int, tuple[Tensor, set[_Gradient]]] = {}  # by address, each with its parameter
        self._made: dict[int, tuple[ref[Tensor], frozenset[_Source]]] = {}
        self._looked: set[CodeType] = set()
        self._reads: set[_Source] = set()
        self._optimizer_steps = False
        self._handles: list[RemovableHandle] = []
        self.touched = False

    def __enter__(self) -> Self:
        """Begins; what an optimizer does in its step is left out."""
        self._handles = [
            register_optimizer_step_pre_hook(lambda *_arguments: self._leave_out(True)),
            register_optimizer_step_post_hook(lambda *_arguments: self._leave_out(False)),
        ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends."""
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _leave_out(self, what: bool) -> None:
        self._optimizer_steps = what

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, and notes what its results depend on."""
        kwargs = kwargs or {}
        caller = sys._getframe(1).f_code
        if Dependence.paused or self._optimizer_steps or caller.co_filename.startswith(_PACKAGE):
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is Tensor.data and getattr(func, "__name__", "") == "__set__":
            self._write(args[0], self._sources(args[1:]))
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result, caller)
        return result

    def found(self, kept: Callable[[Tensor, set[str]], bool]) -> Found:
        """What has been found, once it is left.

        Args:
            kept: Whether a tensor that is kept and depends on weights of these names is in order.
        """
        reads = set(self._reads)
        for reference, sources in self._made.values():
            tensor = reference()
            if tensor is None or address_of(tensor) in self._weights.foreign:
                continue
            weights = {source for source in sources if isinstance(source, str)}
            if not (weights and kept(tensor, weights)):
                reads |= sources
        gradients = {source for source in reads if isinstance(source, _Gradient)}
        return Found(
            sorted(source for source in reads if isinstance(source, str)),
            any(source.code in self._looked for source in gradients),
        )

    def _note(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any, caller: CodeType) -> None:
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.grad:
            self._note_gradient(args[0], result, caller)
            return
        if name == "__set__":
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        if name in _READS:
            self._reads |= self._sources(tensors)
            return
        if name.startswith("_foreach") and args and isinstance(args[0], (list, tuple)):
            count = len(args[0])
            results = result if isinstance(result, (list, tuple)) and len(result) == count else [None] * count
            for place in range(count):
                each = [_at(argument, place, count) for argument in (*args, *kwargs.values())]
                self._note_one(name, [leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)], results[place])
            return
        if "out" in kwargs:
            targets = [leaf for leaf in tree_leaves(kwargs["out"]) if isinstance(leaf, Tensor)]
            for target in targets:
                self._write(target, self._sources(tensors))
            return
        self._note_one(name, tensors, result)

    def _note_one(self, name: str, tensors: list[Tensor], result: Any) -> None:
        if tensors and _is_in_place(name):
            self._write(tensors[0], self._sources(tensors[1:]))
            return
        sources = self._sources(tensors)
        if sources:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._mark(leaf, sources)

    def _note_gradient(self, parameter: Any, gradient: Tensor | None, code: CodeType) -> None:
        address = address_of(parameter)
        if gradient is not None:
            name = self._weights.own.get(address)
            if name is not None:
                self.touched = True
                self._gradients.setdefault(address_of(gradient), (parameter, set()))[1].add(_Gradient(name, code))
        elif id(parameter) in self._weights.trained or (is_fake(parameter) and isinstance(parameter, nn.Parameter)):
            self.touched = True
            self._looked.add(code)

    def _sources(self, tensors: Iterable[Tensor]) -> frozenset[_Source]:
        sources: set[_Source] = set()
        for tensor in tensors:
            made = self._made.get(id(tensor))
            if made is not None and made[0]() is tensor:
                sources |= made[1]
            address = address_of(tensor)
            weight = self._weights.elsewhere.get(address)
            if weight is not None:
                self.touched = True
                sources.add(weight)
            sources |= self._gradients_at(address)
        return frozenset(sources)

    def _gradients_at(self, address: int) -> set[_Gradient]:
        parameter, gradients = self._gradients.get(address, (None, set()))
        if parameter is None or parameter.grad is None or address_of(parameter.grad) != address:
            return set()  # or no longer: another tensor may be there now
        return gradients

    def _write(self, target: Tensor, sources: frozenset[_Source]) -> None:
        if not sources:
            return
        address = address_of(target)
        if address in self._weights.foreign:
            return
        gradients = self._gradients_at(address)
        name = next(iter(gradients)).name if gradients else self._weights.own.get(address)
        if name is None:
            self._mark(target, sources)
            return
        self._reads |= {source for source in sources if isinstance(source, str) or source.name != name}

    def _mark(self, tensor: Tensor, sources: frozenset[_Source]) -> None:
        address = address_of(tensor)
        known = address in self._weights.own or address in self._weights.foreign or self._gradients_at(address)
        if known or is_fake(tensor):
            return  # a view of what is known by its address
        made = self._made.get(id(tensor))
        before = made[1] if made is not None and made[0]() is tensor else frozenset()
        self._made[id(tensor)] = (ref(tensor), before | sources)


@contextmanager
def unwatched() -> Iterator[None]:
    """While entered, what is done with weights and gradients is in order."""
    Dependence.paused += 1
    try:
        yield
    finally:
        Dependence.paused -= 1


def address_of(tensor: Tensor) -> int:
    """Where the values of a tensor are, of a view those of the whole; a number that is none if it has no such place."""
    if is_fake(tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
        return -id(tensor)
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")) or name == "__setitem__"
    return name.endswith("_")


def _at(argument: Any, place: int, count: int) -> Any:
    return argument[place] if isinstance(argument, (list, tuple)) and len(argument) == count else argument


__all__ = ["Dependence", "Found", "Weights", "address_of", "unwatched"]
