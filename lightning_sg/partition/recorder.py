"""Notes how each tensor of a traced step was computed from the batch and from parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from lightning_sg._compat import tree_leaves
from lightning_sg.batch.path import tensors_in
from lightning_sg.batch.program import (
    Constant,
    FromBatch,
    FromModule,
    Node,
    Operation,
    Value,
    mapped,
    size_of,
    values_in,
)
from lightning_sg.partition.draws import Draws
from lightning_sg.partition.expected import expected
from lightning_sg.partition.fakes import is_fake
from lightning_sg.partition.in_place import OnCopy, OnView, ViewTaken, views_of
from lightning_sg.partition.layout import has_channels_second
from lightning_sg.partition.naming import loss_around
from lightning_sg.partition.numbers import Number, number
from lightning_sg.predictors.layout import Layout

_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZES = (_SHAPE, Tensor.size)
_READS = (Tensor.item,)
_FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray)
# They change nothing that a tensor's value depends on, despite the underscore.
_HARMLESS = ("requires_grad_", "detach_", "retain_grad", "share_memory_", "register_hook", "rename_")
_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__iand__")
_FILLS = {"zeros_like": 0, "ones_like": 1, "empty_like": 0, "new_zeros": 0, "new_ones": 1, "new_empty": 0}
# A tensor that nobody knows is taken for a constant if it has no more elements than this.
_SMALL = 64


class Recorder(TorchFunctionMode):
    """Sees every torch operation of a step and notes how its results were computed.

    Args:
        module: The LightningModule, with tensors without data for its parameters and buffers.
        batch: The batch that the step is run on.
        origin: For the id of each of those tensors, the parameter or buffer that it stands for.

    Attributes:
        loss: The loss that the step returned or went backward from, once there is one.
        by_hand: Whether the step went backward itself.
        calls: The operations that depend on parameters, in order.
        draws: The random numbers of the step; it is told when another stage begins.
        changed: The names of the buffers that the step changed.
    """

    def __init__(self, module: nn.Module, batch: Any, origin: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.loss: Value | None = None
        self.by_hand = False
        self.calls: list[Operation] = []
        self.draws = Draws()
        self.changed: set[str] = set()
        self._metric = ""
        self._buffers = dict(module.named_buffers())
        self._known: dict[int, tuple[Tensor, Value]] = {}  # holds the tensors, so that no id is used again
        self._leaves: list[tuple[Value, tuple[int, ...]]] = []
        for path, tensor in tensors_in(batch):
            value = Value(FromBatch(path=path, tensor=tensor, shape=tuple(tensor.shape)))
            self._remember(tensor, value)
            self._leaves.append((value, tuple(tensor.shape)))
        self._know_module(module, origin)

    def _know_module(self, module: nn.Module, origin: Mapping[int, Tensor]) -> None:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            real = origin.get(id(tensor), tensor)
            trained = isinstance(real, nn.Parameter)
            self._remember(tensor, Value(FromModule(network=trained, module=module, name=name, tensor=real)))
        for child in module.modules():
            for attribute in vars(child).values():
                parts = attribute if isinstance(attribute, (list, tuple)) else [attribute]
                if isinstance(attribute, dict):
                    parts = list(attribute.values())
                for part in parts:
                    if isinstance(part, Tensor) and id(part) not in self._known:
                        self._remember(part, Value(Constant(tensor=part)))

    # ------------------------------------------------------------------ during the step

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward and self.loss is None:
            self.take_loss(args[0])
        in_place = _changes(func, kwargs)
        inputs = self._noted((tuple(args), kwargs))
        changed = args[0] if in_place and args and isinstance(args[0], Tensor) else None
        with self.draws.watching():
            result = func(*args, **kwargs)
        if func in _SIZES:
            return self._sized(args, kwargs, result)
        if func is Tensor.numel:
            return self._counted(args[0], result)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func in _READS and not self._value(args[0]).node.network:
            return number(result, Value(self._operation(func, inputs, [])))
        fill = _fill_of(func, args, kwargs)
        if fill is not None and tensors and not self._is_known(tensors[0]):
            self._remember(tensors[0], self._filled(fill, tensors[0]))
        elif changed is not None:
            self._change(changed, func, inputs)
        elif func in _FROM_PYTHON and not list(values_in(inputs)) and tensors:
            self._value(tensors[0])  # numbers that Python or NumPy may have computed from the batch
        elif func in (torch.clone, Tensor.clone) and tensors:
            self._remember(tensors[0], self._value(args[0] if args else next(iter(kwargs.values()))))
        else:
            self._take_results(func, inputs, result, tensors)
        return result

    def _take_results(self, func: Callable[..., Any], inputs: Any, result: Any, tensors: list[Tensor]) -> None:
        new = [tensor for tensor in tensors if not self._is_known(tensor)]
        if not new:  # such as `y.float()` of what is float already
            return
        operation = self._operation(func, inputs, tensors)
        whole = isinstance(result, Tensor)
        leaves = tree_leaves(result)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and not self._is_known(leaf):
                self._remember(leaf, Value(operation, None if whole else place))

    def _filled(self, fill: float | bool, tensor: Tensor) -> Value:
        """A tensor of one number, which depends on no more than sizes: ``zeros_like(h)`` is of no use of ``h``."""
        sizes = self._noted(self._sized((tensor,), {}, tensor.shape))
        kwargs = {"dtype": tensor.dtype, "device": tensor.device}
        return Value(self._operation(torch.full, ((sizes, fill), kwargs), [tensor]))

    def _operation(self, func: Callable[..., Any], inputs: Any, results: Sequence[Tensor]) -> Operation:
        args, kwargs = inputs
        values = list(values_in(inputs))
        tensors = [value for value in values if not value.is_size]
        network, batch = any(v.node.network for v in tensors), any(v.node.batch for v in values)
        obstacle = next((v.node.obstacle for v in values if v.node.obstacle and not v.node.network), "")
        own = kwargs.get("generator") is not None
        kwargs = {key: each for key, each in kwargs.items() if key != "generator"}
        shapes = tuple(tuple(map(int, tensor.shape)) for tensor in results)
        sized = batch and all(v.node.sized for v in values if v.node.batch)
        flows = any(tensor.requires_grad for tensor in results)
        made = Operation(network, batch, obstacle, sized, func, args, kwargs, shapes, flows=flows)
        self.draws.take(made, own_generator=own)
        if network:
            self.calls.append(made)
            if any(value.node.batch and not value.node.network for value in tensors):
                made.within = loss_around() or self._metric
        return made

    def _change(self, tensor: Tensor, func: Callable[..., Any], inputs: Any) -> None:
        """A tensor was changed in place, and with it what shares its memory."""
        before, memory = self._value(tensor), _memory(tensor)
        sharing = [
            each for each in self._known.values() if each[0] is tensor or (memory and _memory(each[0]) == memory)
        ]
        values = {value for _tensor, value in sharing}
        base, views = views_of(before, values)
        if isinstance(base.node, FromModule):
            self.changed.add(base.node.name)
        if views:
            (args, kwargs), whole = inputs, [each for each, value in sharing if value == base]
            changed = OnView(func, [view.function for view, _place in views])
            taken = [(view.args[1:], view.kwargs, place) for view, place in views]
            after = Value(self._operation(changed, ((base, taken, *args[1:]), kwargs), whole[:1]))
        else:
            after = Value(self._operation(OnCopy(func), inputs, [tensor]))
        for other, value in sharing:
            root, views = views_of(value, values)
            if root == base:
                self._remember(other, self._seen_through(views, after, other))
            else:
                obstacle = "a tensor that shares its memory was changed in place"
                self._remember(other, Value(Node(value.node.network, value.node.batch, obstacle)))

    def _seen_through(self, views: Sequence[ViewTaken], base: Value, tensor: Tensor) -> Value:
        """What a tensor is when the one that it is a view of has changed."""
        value = base
        for view, place in views:
            made = self._operation(view.function, ((value, *view.args[1:]), view.kwargs), [tensor])
            made.shapes = view.shapes
            value = Value(made, place)
        return value

    # ------------------------------------------------------------------ values

    def _remember(self, tensor: Tensor, value: Value) -> None:
        self._known[id(tensor)] = (tensor, value)

    def _is_known(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known

    def _value(self, tensor: Tensor) -> Value:
        if not self._is_known(tensor):
            self._remember(tensor, Value(self._stranger(tensor)))
        return self._known[id(tensor)][1]

    def _stranger(self, tensor: Tensor) -> Node:
        """Where a tensor comes from that no operation returned."""
        if is_fake(tensor) or tensor.requires_grad:  # a custom autograd function
            return Operation(network=True, shapes=(tuple(tensor.shape),), obstacle="it is computed out of sight")
        if tensor.numel() <= _SMALL and tensor.shape[:1] not in {shape[:1] for _value, shape in self._leaves if shape}:
            return Constant(tensor=tensor)
        return Node(batch=True, obstacle="it is neither in the batch nor computed from it by torch's operations")

    def _noted(self, arguments: Any) -> Any:
        def noted(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return self._value(argument)
            if isinstance(argument, Number):
                return argument.value if argument.value is not None else argument
            return argument

        return mapped(arguments, noted)

    def _sized(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        tensor = args[0]
        if isinstance(result, int):
            place = args[1] if len(args) > 1 else kwargs["dim"]
            return number(result, self._size(tensor, int(place) % tensor.ndim))
        return torch.Size([number(size, self._size(tensor, place)) for place, size in enumerate(result)])

    def _counted(self, tensor: Tensor, result: int) -> Any:
        product: Any = 1
        for size in self._sized((tensor,), {}, result=torch.Size(tensor.shape)):
            product = product * size
        return product

    def _size(self, tensor: Tensor, place: int) -> Value:
        """How to find the size again: from this tensor if it is the batch's, else from one of the same size that is.

        A size that no tensor of the batch has is taken for a constant.
        """
        value = self._value(tensor)
        if not value.node.network and value.node.batch and not value.node.obstacle:
            return size_of(value, place)
        size = int(tensor.shape[place])
        found = [(leaf, other) for leaf, shape in self._leaves for other, same in enumerate(shape) if same == size > 1]
        found.sort(key=lambda each: (each[1] != place, (each[1] == 0) != (place == 0)))
        leaf, other = found[0] if found else (Value(Constant(tensor=torch.empty(()).expand(size))), 0)
        return size_of(leaf, other, asked=size_of(value, place))

    @property
    def rows(self) -> tuple[int, ...]:
        """The first size of each tensor of the batch."""
        return tuple(shape[0] for _value, shape in self._leaves if shape)

    def take_same(self, tensor: Tensor, other: Tensor) -> None:
        """Notes that a tensor is another one in a class of its own, or without its class."""
        self._remember(tensor, self._value(other))

    # ------------------------------------------------------------------ the loss

    def take_loss(self, result: Any, *, by_hand: bool = False) -> None:
        """Takes what the step returned or goes backward from, unless it went backward before.

        Args:
            result: What that is.
            by_hand: Whether the step goes backward itself.
        """
        self.by_hand = self.by_hand or by_hand
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if self.loss is None and isinstance(loss, Tensor) and loss.requires_grad:
            self.loss = self._value(loss)

    def expected(self, tensor: Tensor) -> bool | None:
        """What a check of values that a step reads finds if all is well: no NaN; ``None`` for anything else."""
        return expected(self._value(tensor))

    def layout_of(self, tensors: Sequence[Tensor]) -> Layout:
        """The order of the dimensions of some tensors of the step."""
        places = (place for place, tensor in enumerate(tensors) if has_channels_second(self._value(tensor)))
        return Layout(frozenset(places))

    def look_for_changes(self, module: nn.Module) -> None:
        """Notes the buffers that the step has put others in the place of."""
        now = dict(module.named_buffers())
        self.changed |= {name for name, buffer in self._buffers.items() if now.get(name) is not buffer}

    def forget(self) -> None:
        """Lets go of the tensors of the step and of the batch."""
        self._known, self._buffers, self.calls = {}, {}, []
        for leaf, _shape in self._leaves:
            assert isinstance(leaf.node, FromBatch)
            leaf.node.forget()

    def run_metric(self, metric: Metric, args: Any, kwargs: Any) -> Tensor | None:
        """Runs a metric that may be the loss on a copy without its state; ``None`` if it is no loss.

        A loss says that it is differentiable (``is_differentiable``).

        Args:
            metric: The metric.
            args: What its ``forward`` was called with.
            kwargs: And by keyword.
        """
        if not metric.is_differentiable:
            return None
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
            return None
        try:
            fresh = copy.copy(metric)
            fresh.reset()
            self._metric = type(metric).__name__
            result = type(metric).forward(fresh, *args, **kwargs)
        except Exception:  # a metric such as an accuracy reads values, which these tensors do not have
            return None
        finally:
            self._metric = ""
        return result if isinstance(result, Tensor) and result.requires_grad else None


def _changes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in _HARMLESS:
        return False
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def _memory(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except Exception:  # sparse and other tensors without one
        return None


def _fill_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | bool | None:
    """The number that an operation fills a new tensor of known size with; ``None`` if it does anything else."""
    name = getattr(func, "__name__", "")
    if name in _FILLS:
        return _FILLS[name]
    if name in ("full_like", "new_full"):
        fill = kwargs.get("fill_value", args[-1] if len(args) > 1 else None)
        return fill if isinstance(fill, (int, float)) and not isinstance(fill, Number) else None
    return None


__all__ = ["Recorder"]
