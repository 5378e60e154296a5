"""Fake tensors: a shape, dtype and device without data, in place of the parameters that other processes hold.

An operation on a fake tensor returns a fake tensor. So the user's code runs up to this process's stages without
computing anything, and shows the shapes that the process must receive there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_sg._compat import FakeTensor, enable_python_dispatcher, tree_leaves
from lightning_sg.partition.fake_mode import WithoutData
from lightning_sg.partition.reads import Reads
from lightning_sg.partition.replaced import Held, ReplacedTensors, replace
from lightning_sg.partition.shadow import shadowed


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without data."""
    return isinstance(value, FakeTensor)


def fake_like(tensor: Tensor) -> Tensor:
    """Makes a fake tensor with the shape, dtype and device of ``tensor``."""
    return WithoutData().without_data(tensor)


class FakeTensors(ReplacedTensors):
    """Replaces the named parameters and buffers of ``module`` by fake tensors inside the context.

    Args:
        module: The module that owns the tensors.
        names: Names as in ``named_parameters`` and ``named_buffers``; ``None`` takes all of them.
        device: The device that the fake tensors claim to be on.
        trainable: Whether a fake parameter requires gradients if the real one does. If ``False``, running on fake
            tensors records no graph.
    """

    def __init__(
        self, module: nn.Module, names: Collection[str] | None, device: torch.device, *, trainable: bool
    ) -> None:
        self._mode = WithoutData()
        super().__init__(module, lambda tensor: _fake_of(tensor, self._mode, device, trainable), _real(names))
        self._recurrent = [
            child for child in module.modules() if isinstance(child, nn.RNNBase) and device.type != "cpu"
        ]
        self._shadows = ExitStack()
        self._entered = False

    def take(self, names: Collection[str]) -> None:
        """Replaces further tensors: at once if the context is entered, and whenever it is."""
        places = self._places_of(_real(names))
        self._places += places
        if self._entered:
            replace(places)

    def begin_stages(self) -> None:
        """This process's stages begin: what is drawn in the shape of a fake tensor has data from here on."""
        self._mode.draws = True

    def answer_conditions(self, answer: Callable[[], bool | None]) -> None:
        """Has operations of torch told what a condition on a tensor without data is; ``None`` to fail instead."""
        self._mode.answer = answer

    @property
    def drawn(self) -> int:
        """How many operations would have drawn random numbers for fake tensors."""
        return self._mode.drawn

    def __enter__(self) -> Self:
        self._entered = True
        self._mode.draws = False
        super().__enter__()
        shadows = [(child, "forward", _decomposed(child.forward)) for child in self._recurrent]
        self._shadows.enter_context(shadowed(shadows))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shadows.close()
        self._entered = False
        super().__exit__(kind, error, trace)


def _real(names: Collection[str] | None) -> Callable[[Held], bool]:
    """Finds tensors with data among those of these names."""
    return lambda each: not is_fake(each.tensor) and (names is None or each.name in names)


def _decomposed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decomposes a recurrent layer's forward pass on fake tensors, because cuDNN reads the weights' data.

    On real tensors the forward pass is unchanged.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(is_fake(leaf) for leaf in tree_leaves((args, kwargs))):
            return forward(*args, **kwargs)
        with enable_python_dispatcher():
            return forward(*args, **kwargs)

    return run


def _fake_of(tensor: Tensor, mode: WithoutData, device: torch.device, trainable: bool) -> Tensor:
    fake = mode.without_data(tensor, device)
    if not isinstance(tensor, nn.Parameter):
        return fake
    return nn.Parameter(fake, requires_grad=trainable and tensor.requires_grad)


class FakeOutputs:
    """Caches the outputs of whole submodules for fake tensors, so that a remote block costs a dictionary look-up.

    Running a layer on fake tensors takes about half a millisecond, and the result depends only on the input shapes. If
    a layer reads values of an argument that has data, such as lengths or a mask, it runs each time.

    Args:
        modules: Submodules that hold only fake tensors and no boundary.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self._blocks = [(module, _Cached(module)) for module in modules]
        self._shadows = ExitStack()

    def install(self) -> None:
        """Makes the submodules answer from the cache."""
        for module, cached in self._blocks:
            cached.forward = module.forward
        self._shadows.enter_context(shadowed([(module, "forward", block) for module, block in self._blocks]))

    def remove(self) -> None:
        """Makes the submodules run their own ``forward`` again."""
        self._shadows.close()


class _Cached:
    forward: Callable[..., Any]

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._holds_tensors = next(chain(module.parameters(), module.buffers()), None) is not None
        self._results: dict[Any, tuple[Any, list[torch.Size]]] = {}
        self._reading: set[Any] = set()  # signatures of calls that read values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        if not all(argument is None or isinstance(argument, _PLAIN) for argument in arguments):
            return self.forward(*args, **kwargs)  # the block may change a list or an object
        if not self._holds_tensors and not any(map(is_fake, arguments)):
            return self.forward(*args, **kwargs)  # an activation function in a stage of this process
        kind = next((argument.device.type for argument in arguments if isinstance(argument, Tensor)), "cpu")
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (self._module.training, kind, cast, len(args), *kwargs, *map(_signature, arguments))
        known = self._results.get(key)
        if known is not None and [leaf.shape for leaf in tree_leaves(known[0]) if is_fake(leaf)] == known[1]:
            return known[0]
        if key in self._reading:
            return self.forward(*args, **kwargs)
        with Reads() as reads:
            result = self.forward(*args, **kwargs)
        if reads.any:
            self._reading.add(key)
        elif all(is_fake(leaf) or not isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._results[key] = (result, [leaf.shape for leaf in tree_leaves(result) if is_fake(leaf)])
        return result


_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device, is_fake(leaf))
    return leaf


def remote_blocks(module: nn.Module, elsewhere: Collection[str], cuts: Collection[str]) -> list[nn.Module]:
    """The largest submodules whose tensors are all held by other processes and that contain no boundary.

    torch's own modules without tensors, such as activation functions, count too: they answer from the cache for fake
    tensors and compute for real ones.

    Args:
        module: The user's module.
        elsewhere: The names of the parameters and buffers that other processes hold.
        cuts: The names of the boundaries between stages.
    """
    blocks: list[nn.Module] = []

    def visit(child: nn.Module, prefix: str) -> None:
        inside = [f"{prefix}.{name}" for name, _ in child.named_parameters()]
        inside += [f"{prefix}.{name}" for name, _ in child.named_buffers()]
        holds_cut = any(name.startswith(f"{prefix}.") for name in cuts)
        is_cut = prefix in cuts
        own = not inside and type(child).__module__.startswith("torch.nn.modules.") and not list(child.children())
        if prefix and (inside or own) and not holds_cut and set(inside) <= set(elsewhere) and not is_cut:
            blocks.append(child)
            return
        for name, grandchild in child.named_children():
            visit(grandchild, f"{prefix}.{name}" if prefix else name)

    visit(module, "")
    return list(dict.fromkeys(blocks))


__all__ = ["FakeOutputs", "FakeTensors", "fake_like", "is_fake", "remote_blocks"]
