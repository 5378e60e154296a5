"""Operations that were seen on the tensors of one batch, to be repeated on those of the next.

A :class:`Value` is a tensor or a number as it was computed; a :class:`Program` computes some values again from others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg._compat import tree_leaves
from lightning_sg.batch.path import Path
from lightning_sg.subclasses import plain_tensor


@dataclass(eq=False)
class Node:
    """Where values come from: the base of the kinds below.

    Attributes:
        network: Whether they depend on a parameter.
        batch: Whether they depend on the batch.
        obstacle: Why they cannot be computed again for another batch, or ``""``.
        sized: Whether they depend on the batch only by sizes of its tensors.
    """

    network: bool = False
    batch: bool = False
    obstacle: str = ""
    sized: bool = False

    def __deepcopy__(self, _memo: Any) -> Node:
        return self  # what was seen; it may lead to the model, and through as many nodes as the step has operations


@dataclass(eq=False)
class FromBatch(Node):
    """A tensor of the batch.

    Attributes:
        path: Where it is.
        tensor: It, in the batch that was seen, until :meth:`forget`.
        shape: Its shape in that batch.
    """

    path: Path = field(default_factory=Path)
    tensor: Tensor | None = None
    shape: tuple[int, ...] = ()
    batch: bool = True

    def forget(self) -> None:
        """Lets go of the tensor, which belongs to one batch."""
        self.tensor = None


@dataclass(eq=False)
class FromModule(Node):
    """A parameter or a buffer of the model.

    Attributes:
        module: The model.
        name: The name in the model.
        tensor: The parameter or buffer when it was seen.
    """

    module: nn.Module | None = None
    name: str = ""
    tensor: Tensor | None = None

    @property
    def now(self) -> Tensor:
        """The buffer as it is now."""
        assert self.module is not None
        owner, _, name = self.name.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(owner), name)
        return found


@dataclass(eq=False)
class Constant(Node):
    """A tensor that is the same for every batch.

    Attributes:
        tensor: The tensor.
    """

    tensor: Tensor | None = None


@dataclass(eq=False)
class StageNumbers(Node):
    """The random numbers of a stage, before any of them is drawn.

    Attributes:
        stage: The stage, as :class:`~lightning_sg.rng.StepRandomness` counts them.
        after: What was drawn last before, if anything was.
    """

    stage: int = 0
    after: Value | None = None


@dataclass(eq=False)
class Operation(Node):
    """A call of a function on values.

    Attributes:
        function: The function.
        args: Its positional arguments, with a :class:`Value` for each tensor and each number that was computed.
        kwargs: Its keyword arguments, likewise.
        shapes: The shapes of the tensors that it returned.
        size: Whether it only asks for the size of a tensor.
        within: The name of the loss that it is a part of, if its callers say so.
        after: If it draws random numbers: what was drawn last before, or the stage's numbers.
        flows: Whether gradients flow back through any of these.
        asked: If it takes a size from the batch in place of the network: of what it was asked.
    """

    function: Callable[..., Any] = torch.clone
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ()
    size: bool = False
    within: str = ""
    after: Value | None = None
    flows: bool = False
    asked: Value | None = None

    @property
    def inputs(self) -> list[Value]:
        """The values among its arguments."""
        return list(values_in((self.args, self.kwargs)))

    @property
    def name(self) -> str:
        """The name of the function, without underscores around it."""
        return getattr(self.function, "__name__", "").strip("_")


@dataclass(frozen=True)
class Value:
    """A tensor or number.

    Attributes:
        node: Where it comes from.
        place: Which of the tensors that an operation returned it is; ``None`` if the operation returned only this.
    """

    node: Node
    place: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it had, ``()`` for a number."""
        node = self.node
        if isinstance(node, Operation):
            return node.shapes[self.place or 0] if node.shapes else ()
        if isinstance(node, FromBatch):
            return node.shape
        tensor = getattr(node, "tensor", None)
        return () if tensor is None else tuple(tensor.shape)

    @property
    def is_size(self) -> bool:
        """Whether it is the size of a tensor, or computed from sizes by Python."""
        return isinstance(self.node, Operation) and self.node.size


def values_in(arguments: Any) -> Iterator[Value]:
    """The values in a function's arguments, in order."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, slice):
        yield from values_in((arguments.start, arguments.stop, arguments.step))
    elif isinstance(arguments, Mapping):
        yield from values_in(tuple(arguments.values()))
    elif isinstance(arguments, (list, tuple)):
        for argument in arguments:
            yield from values_in(argument)


def mapped(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """A function's arguments with each of those in lists, tuples, dicts and slices replaced by what ``change`` says."""
    if isinstance(arguments, slice):
        return slice(*(mapped(each, change) for each in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, dict):
        return {key: mapped(each, change) for key, each in arguments.items()}
    if isinstance(arguments, tuple) and hasattr(arguments, "_fields"):
        return type(arguments)(*(mapped(each, change) for each in arguments))
    if isinstance(arguments, (list, tuple)):
        parts = [mapped(each, change) for each in arguments]
        return parts if isinstance(arguments, list) else tuple(parts)
    return change(arguments)


@dataclass(frozen=True)
class _Slot:
    """The place of a value in a running program."""

    number: int


class Program:
    """Computes values from given ones, by the operations between them.

    Args:
        wanted: The values to compute.
        given: Values that are given when it runs.
        replaced: Values in the place of others.

    Attributes:
        paths: The places of the batch that it uses.
        buffers: The names of the buffers that it uses.
        draws: Whether it draws random numbers again that a step has drawn.
    """

    def __init__(
        self, wanted: Sequence[Value], given: Sequence[Value] = (), replaced: Mapping[Value, Value] | None = None
    ) -> None:
        self._replaced = replaced or {}
        self._slots: dict[Value, int] = {value: number for number, value in enumerate(given)}
        self._given = len(given)
        self._steps: list[tuple[Node, Any, Any, list[tuple[int, int | None]]]] = []
        self._done: dict[Node, int] = {}
        for value in wanted:
            self._add(value)
        self._wanted = [self._slots[value] for value in wanted]
        self.paths = [node.path for node, *_ in self._steps if isinstance(node, FromBatch)]
        self.buffers = [node.name for node, *_ in self._steps if isinstance(node, FromModule)]
        self.draws = any(isinstance(node, StageNumbers) for node, *_ in self._steps)

    @property
    def leaves(self) -> list[Value]:
        """The tensors of the batch that it uses, also those that only earlier draws depend on."""
        return [Value(node) for node, *_ in self._steps if isinstance(node, FromBatch)]

    def _add(self, wanted: Value) -> None:
        pending = [wanted]
        while pending:
            value = pending[-1]
            if value in self._slots:
                pending.pop()
                continue
            node = value.node
            missing = [each for each in self._inputs(node) if each not in self._slots]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            slot = self._slots[value] = len(self._slots)
            if node not in self._done:
                args, kwargs = (
                    (mapped(node.args, self._slot), mapped(node.kwargs, self._slot))
                    if isinstance(node, Operation)
                    else ((), {})
                )
                self._done[node] = len(self._steps)
                self._steps.append((node, args, kwargs, []))
            self._steps[self._done[node]][3].append((slot, value.place))

    def _inputs(self, node: Node) -> list[Value]:
        inputs = [self._replaced.get(each, each) for each in node.inputs] if isinstance(node, Operation) else []
        before = node.after if isinstance(node, (Operation, StageNumbers)) else None
        return inputs if before is None else [*inputs, before]

    def _slot(self, value: Any) -> Any:
        return _Slot(self._slots[self._replaced.get(value, value)]) if isinstance(value, Value) else value

    def __deepcopy__(self, _memo: Any) -> Program:
        return self  # it holds the model's buffers, and never changes

    def run(
        self,
        batch: Any,
        given: Sequence[Any] = (),
        device: torch.device | None = None,
        begin: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Computes the values that are wanted.

        Args:
            batch: What paths lead into.
            given: The given values.
            device: Where constants are taken to; by default they stay where they are.
            begin: Sets the generators to the numbers of a stage; without it what is drawn are other numbers.
        """
        table: list[Any] = [*given, *[None] * (len(self._slots) - self._given)]

        def filled(argument: Any) -> Any:
            if isinstance(argument, _Slot):
                return table[argument.number]
            if device is not None and isinstance(argument, torch.device):
                return device
            return argument

        for node, args, kwargs, places in self._steps:
            if isinstance(node, Operation):
                result = node.function(*mapped(args, filled), **mapped(kwargs, filled))
            elif isinstance(node, FromBatch):
                result = plain_tensor(node.path.of(batch))
            elif isinstance(node, StageNumbers):
                result = None if begin is None else begin(node.stage)
            else:
                tensor = node.now if isinstance(node, FromModule) else node.tensor  # type: ignore[attr-defined]
                result = tensor if device is None else tensor.to(device)
            for slot, place in places:
                table[slot] = result if place is None else tree_leaves(result)[place]
        return [table[slot] for slot in self._wanted]


def size_of(value: Value, place: int, asked: Value | None = None) -> Value:
    """The size of a tensor in one dimension.

    Args:
        value: The tensor.
        place: The dimension.
        asked: The size of a tensor of the network that the code asked for, if this is taken in its place.
    """
    return Value(Operation(batch=True, sized=True, function=Tensor.size, args=(value, place), size=True, asked=asked))


def described(value: Value) -> str:
    """The value in words: where in the batch it comes from, and what is drawn for it."""
    paths = sorted({str(leaf.node.path) for leaf in leaves_of(value) if isinstance(leaf.node, FromBatch)})
    drawn = drawn_for(value)
    return ", ".join([*paths, *([drawn] if drawn else [])]) or "constants"


def leaves_of(value: Value) -> Iterator[Value]:
    """The tensors of the batch that a value was computed from."""
    yield from (Value(node) for node in _ancestors(value) if isinstance(node, FromBatch))


def drawn_for(value: Value) -> str:
    """The random numbers that a value was computed from, in words; empty if there are none."""
    names = {node.name for node in _ancestors(value) if isinstance(node, Operation) and node.after is not None}
    return f"what the step draws ({', '.join(sorted(names))})" if names else ""


def _ancestors(value: Value) -> Iterator[Node]:
    seen: set[Node] = set()
    pending = [value.node]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if isinstance(node, Operation):
            pending.extend(each.node for each in node.inputs)


__all__ = [
    "Constant",
    "FromBatch",
    "FromModule",
    "Node",
    "Operation",
    "Program",
    "StageNumbers",
    "Value",
    "described",
    "drawn_for",
    "leaves_of",
    "mapped",
    "size_of",
    "values_in",
]
