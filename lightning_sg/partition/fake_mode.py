"""Runs operations on tensors without data, and computes what sizes or the batch alone decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sg._compat import FakeTensor, FakeTensorMode, tree_leaves, tree_map_only

_aten = torch.ops.aten
#: Operations that take no more of their first argument than its shape, dtype and device, and fill the result.
_FILLS = frozenset(
    {_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full}
)
#: The same, but what is in the result is drawn, or still to be written.
_DRAWS = frozenset(
    {
        *(_aten.rand_like, _aten.randn_like, _aten.randint_like),
        *(_aten.empty_like, _aten.new_empty, _aten.new_empty_strided),
    }
)
#: Operations that take no more of their second argument than its shape, dtype and device.
_LIKE_ANOTHER = frozenset({_aten.view_as, _aten.reshape_as, _aten.expand_as, _aten.type_as})


class _Sized(NamedTuple):
    """An operation whose result has a size that depends on values.

    Attributes:
        deciding: Takes its arguments and returns the tensors whose values decide.
        computed: The places of those results that depend on nothing else.
    """

    deciding: Callable[..., list[Any]]
    computed: tuple[int, ...] = ()


def _masks(_tensor: Tensor, indices: Sequence[Tensor | None]) -> list[Any]:
    return [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]


def _lengths(_logarithms: Tensor, labels: Tensor, *lengths: Any) -> list[Any]:
    return [labels, *(each for each in lengths[:2] if isinstance(each, Tensor))]


_SIZED = {
    _aten.index.Tensor: _Sized(_masks),
    _aten.masked_select.default: _Sized(lambda _tensor, mask: [mask]),
    _aten._ctc_loss.default: _Sized(_lengths),
    _aten._ctc_loss.Tensor: _Sized(_lengths),
    _aten.bincount.default: _Sized(lambda places, *_others: [places]),
    _aten.repeat_interleave.self_Tensor: _Sized(lambda _tensor, repeats, *_others: [repeats]),
    _aten._pack_padded_sequence.default: _Sized(lambda _tensor, lengths, *_others: [lengths], (1,)),
    _aten._pad_packed_sequence.default: _Sized(lambda _tensor, sizes, *_others: [sizes], (1,)),
}


def values_deciding(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """The tensors whose values decide the size of an operation's result; ``None`` if it is not known for that."""
    sized = _SIZED.get(func)
    return None if sized is None else sized.deciding(*args, **kwargs)


class WithoutData(FakeTensorMode):
    """Makes tensors without data, and runs the operations on them.

    Like torch's own, except that a result has data if the tensors without data that it is made from give it a shape, a
    dtype or a device only. And where the size of a result depends on values that are there, such as a mask or lengths
    of the batch, it is found from them.

    Attributes:
        draws: Whether tensors that are drawn in the shape of another, or left empty, have data. That is so in the
            stages of this process, which use them; before these it would be of no use.
        drawn: How many operations would have drawn random numbers for tensors without data, and did not.
        answer: Tells an operation that is made of others, such as ``gaussian_nll_loss``, what a condition is that it
            checks on tensors without data; ``None`` to let it fail.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.draws = False
        self.drawn = 0
        self.answer: Callable[[], bool | None] = lambda: None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        if packet is _aten._local_scalar_dense and args[0].dtype is torch.bool and isinstance(args[0], FakeTensor):
            answer = self.answer()
            if answer is not None:
                return answer
        if (packet in _FILLS or (self.draws and packet in _DRAWS)) and isinstance(args[0], FakeTensor):
            return func(_zeros(args[0]), *args[1:], **kwargs)
        if packet in _LIKE_ANOTHER and not isinstance(args[0], FakeTensor):
            return func(args[0], _zeros(args[1]))
        deciding = values_deciding(func, args, kwargs)
        if deciding or torch.Tag.dynamic_output_shape in getattr(func, "tags", ()):
            if not _has_fakes((args, kwargs)):
                return func(*args, **kwargs)
            if deciding and not _has_fakes(deciding):
                return self._on_zeros(func, args, kwargs, _SIZED[func].computed)
        self.drawn += draws(func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def without_data(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """A tensor without data like ``tensor``, perhaps on another device."""
        device = tensor.device if device is None else device
        with self, torch.no_grad():
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    def _on_zeros(self, func: Any, args: Any, kwargs: Any, computed: tuple[int, ...]) -> Any:
        """Runs an operation with zeros for tensors without data; results that depend on these have none either."""
        args, kwargs = tree_map_only(FakeTensor, _zeros, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return self.without_data(result)
        return tuple(each if place in computed else self.without_data(each) for place, each in enumerate(result))


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros in the shape of a tensor, which take no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers: dropout in evaluation does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    return not any(given.get(name, 1) in (0, False) for name in ("dropout_p", "dropout", "train", "training"))


def _has_fakes(arguments: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(arguments))


__all__ = ["WithoutData", "draws", "values_deciding"]
