"""Other tensors in the place of a module's parameters and buffers, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Self

from torch import Tensor, nn


class Held(NamedTuple):
    """A parameter or buffer where a submodule holds it.

    Attributes:
        name: As in ``named_parameters`` and ``named_buffers``; a tied parameter has several.
        held: The dict that holds it in its submodule.
        key: Its key there.
        tensor: The tensor.
    """

    name: str
    held: dict[str, Any]
    key: str
    tensor: Tensor


def held_tensors(module: nn.Module) -> Iterator[Held]:
    """All parameters and buffers of a module, each wherever a submodule holds it."""
    for prefix, child in module.named_modules():
        for held in (child._parameters, child._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    yield Held(f"{prefix}.{key}" if prefix else key, held, key, tensor)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module by their names, each under its first."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class ReplacedTensors(AbstractContextManager["ReplacedTensors"]):
    """Puts other tensors in the place of a module's inside the context; tied parameters stay tied.

    Args:
        module: The module that owns the tensors.
        make: Makes the tensor that stands for another.
        wanted: Which are replaced.

    Attributes:
        origin: For the id of each tensor that stands for another, that other.
    """

    def __init__(self, module: nn.Module, make: Callable[[Tensor], Tensor], wanted: Callable[[Held], bool]) -> None:
        self.origin: dict[int, Tensor] = {}
        self._module = module
        self._make = make
        self._made: dict[int, Tensor] = {}  # by the id of the real tensor
        self._places = self._places_of(wanted)

    def _places_of(self, wanted: Callable[[Held], bool]) -> list[tuple[Held, Tensor]]:
        """Where tensors are in the module, each with what stands for it."""
        return [(each, self._stand_in(each.tensor)) for each in held_tensors(self._module) if wanted(each)]

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            made = self._made[id(tensor)] = self._make(tensor)
            self.origin[id(made)] = tensor
        return self._made[id(tensor)]

    def __enter__(self) -> Self:
        replace(self._places)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place, _made in self._places:
            place.held[place.key] = place.tensor


def replace(places: list[tuple[Held, Tensor]]) -> None:
    """Puts each tensor in the place that it is listed with."""
    for place, made in places:
        place.held[place.key] = made


__all__ = ["Held", "ReplacedTensors", "held_tensors", "named_tensors", "replace"]
