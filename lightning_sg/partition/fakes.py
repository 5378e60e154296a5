"""Ghosts: tensors with a shape, dtype and device but no data, in the place of parameters held elsewhere.

Any operation with a ghost among its arguments gives a ghost, so the user's own code runs up to its stage
without computing anything, and knows the shape of what it must receive there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg._compat import FakeTensor, FakeTensorMode, enable_python_dispatcher, tree_leaves
from lightning_sg.partition.shadow import shadowed


def is_ghost(value: object) -> bool:
    """Whether ``value`` is a tensor without data."""
    return isinstance(value, FakeTensor)


def ghost_like(tensor: Tensor) -> Tensor:
    """A ghost with the form of ``tensor``."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty_like(tensor)


class Ghosts(AbstractContextManager["Ghosts"]):
    """While entered, the named parameters and buffers of ``module`` are ghosts; after it, themselves again.

    Args:
        module: The module that owns the tensors.
        names: Names as in ``named_parameters`` and ``named_buffers``; ``None`` takes all of them.
        device: The device that the ghosts claim to be on.
        trainable: Whether ghosts of parameters require gradients as the parameters do. Without, running on
            ghosts records no graph.
    """

    def __init__(
        self, module: nn.Module, names: Collection[str] | None, device: torch.device, *, trainable: bool
    ) -> None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.origin: dict[int, Tensor] = {}  # id of a ghost -> the tensor that it stands for
        self._ghosts: dict[int, Tensor] = {}  # id of a tensor -> its ghost: tied parameters stay tied
        self._places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._recurrent: list[nn.Module] = []
        self._shadows = ExitStack()
        for prefix, child in module.named_modules():
            for held in (child._parameters, child._buffers):
                for key, tensor in held.items():
                    name = f"{prefix}.{key}" if prefix else key
                    if tensor is None or (names is not None and name not in names):
                        continue
                    if id(tensor) not in self._ghosts:
                        ghost = _ghost_of(tensor, mode, device, trainable)
                        self._ghosts[id(tensor)] = ghost
                        self.origin[id(ghost)] = tensor
                    self._places.append((held, key, tensor, self._ghosts[id(tensor)]))
            if isinstance(child, nn.RNNBase) and device.type != "cpu":
                self._recurrent.append(child)

    def __enter__(self) -> Ghosts:
        for held, key, _tensor, ghost in self._places:
            held[key] = ghost
        shadows = [(child, "forward", _taken_apart(child.forward)) for child in self._recurrent]
        self._shadows.enter_context(shadowed(shadows))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shadows.close()
        for held, key, tensor, _ghost in self._places:
            held[key] = tensor


def _taken_apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a recurrent layer on ghosts, by operations that know what to do with them.

    With data it stays as it is.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(is_ghost(leaf) for leaf in tree_leaves((args, kwargs))):
            return forward(*args, **kwargs)
        with enable_python_dispatcher():
            return forward(*args, **kwargs)

    return run


def _ghost_of(tensor: Tensor, mode: FakeTensorMode, device: torch.device, trainable: bool) -> Tensor:
    with mode, torch.no_grad():
        ghost = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if not isinstance(tensor, nn.Parameter):
        return ghost
    return nn.Parameter(ghost, requires_grad=trainable and tensor.requires_grad)


class GhostMemory:
    """Remembers what whole submodules return for ghosts, so that a remote block costs a dictionary look-up.

    Running a layer on ghosts costs about half a millisecond; the result depends only on the shapes that go in.

    Args:
        modules: Submodules that hold only ghosts and no boundary.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self._blocks = [(module, _Remembering(module)) for module in modules]
        self._shadows = ExitStack()

    def install(self) -> None:
        """From now on the submodules answer from memory."""
        for module, remembering in self._blocks:
            remembering.forward = module.forward
        self._shadows.enter_context(shadowed([(module, "forward", block) for module, block in self._blocks]))

    def remove(self) -> None:
        """The submodules run their own ``forward`` again."""
        self._shadows.close()


class _Remembering:
    forward: Callable[..., Any]

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._results: dict[Any, tuple[Any, list[torch.Size]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        if not all(argument is None or isinstance(argument, _PLAIN) for argument in arguments):
            return self.forward(*args, **kwargs)  # a list or an object may be changed by the block
        kind = next((argument.device.type for argument in arguments if isinstance(argument, Tensor)), "cpu")
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (self._module.training, kind, cast, len(args), *kwargs, *map(_signature, arguments))
        known = self._results.get(key)
        if known is not None and [leaf.shape for leaf in tree_leaves(known[0]) if is_ghost(leaf)] == known[1]:
            return known[0]
        result = self.forward(*args, **kwargs)
        if all(is_ghost(leaf) or not isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._results[key] = (result, [leaf.shape for leaf in tree_leaves(result) if is_ghost(leaf)])
        return result


_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device, is_ghost(leaf))
    return leaf


__all__ = ["GhostMemory", "Ghosts", "ghost_like", "is_ghost"]
