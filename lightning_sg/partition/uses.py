"""Which arguments an operation of torch uses the values of, and which give it a shape, dtype or device only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_sg._compat import tree_leaves

#: By the name of an operation, the place and the name of the argument that gives it a shape, dtype or device only.
_OF_FIRST = (0, "input")
_OF_OTHER = (1, "other")
_SHAPE_ONLY = {
    **dict.fromkeys(
        [
            *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
            *("new", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "new_tensor"),
        ],
        _OF_FIRST,
    ),
    **dict.fromkeys(["view_as", "reshape_as", "expand_as", "type_as", "to"], _OF_OTHER),
    **dict.fromkeys(["resize_as_", "resize_as"], (1, "the_template")),
    "__set__": _OF_FIRST,  # of an attribute of the first argument
}
#: Operations that give numbers from a tensor.
_NUMBERS = frozenset(
    [
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
        *("__array__", "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__"),
    ]
)
#: Operations that read or write values although they return no tensor.
_READ_OR_WRITE = _NUMBERS | {"backward", "__iter__", "__setitem__", "__set__", "__dlpack__", "__format__", "__repr__"}
#: They change nothing that a value depends on, despite their results.
_HARMLESS = frozenset(["requires_grad_", "retain_grad", "register_hook", "rename_", "share_memory_"])
_IN_PLACE = frozenset(
    [
        *("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"),
        *("__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
    ]
)
#: Operations that take a part of a tensor, or see it in another shape. Where nothing is done with what they return, no
#: value was used: a model may return slices of what it has computed, for plots, beside what its loss is made of.
SELECTING = frozenset(
    [
        *("__getitem__", "select", "narrow", "split", "chunk", "unbind", "tensor_split", "index_select", "diagonal"),
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "t"),
        *("swapaxes", "swapdims", "ravel", "expand", "detach", "clone", "contiguous", "cpu", "to", "float"),
        "__get__",  # of an attribute: .T, .data
    ]
)
#: Operations that draw random numbers.
RANDOM = frozenset(
    [
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like"),
        *("randint_like", "normal", "normal_", "bernoulli", "bernoulli_", "multinomial"),
        *("uniform_", "random_", "poisson", "exponential_", "cauchy_", "log_normal_"),
        *("geometric_", "binomial", "_standard_gamma", "_sample_dirichlet"),
    ]
)


def name_of(func: Callable[..., Any]) -> str:
    """The name of an operation."""
    return getattr(func, "__name__", str(func))


def values_among(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of which an operation may use more than the shape, dtype and device."""
    place, name = _SHAPE_ONLY.get(name_of(func), (-1, ""))
    arguments = [each for number, each in enumerate(args) if number != place]
    arguments += [each for key, each in kwargs.items() if key != name]
    yield from (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))


def uses_values(func: Callable[..., Any], result: Any) -> bool:
    """Whether an operation that returned ``result`` used values: if no tensor, it asked for a shape and such."""
    name = name_of(func)
    if name in _HARMLESS:
        return False
    return name in _READ_OR_WRITE or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))


def computed_among(func: Callable[..., Any], result: Any) -> list[Tensor]:
    """The results that depend on lengths only, whatever the other arguments are: batch sizes of packed sequences."""
    return [result[1]] if name_of(func) in ("_pack_padded_sequence", "_pad_packed_sequence") else []


def reads_numbers(func: Callable[..., Any]) -> bool:
    """Whether an operation gives the program numbers from a tensor, on which it may go on one way or another."""
    return name_of(func) in _NUMBERS


def written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that an operation changes in place, if it does."""
    name = name_of(func)
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
    if not (in_place or kwargs.get("inplace") is True) or not args:
        return None
    return args[0] if isinstance(args[0], Tensor) else None


__all__ = [
    "RANDOM",
    "SELECTING",
    "computed_among",
    "name_of",
    "reads_numbers",
    "uses_values",
    "values_among",
    "written",
]
