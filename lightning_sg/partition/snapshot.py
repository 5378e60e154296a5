"""Remembers the Python objects that a step can change through its module, and puts them back as they were."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_sg.batch.attributes import attributes_of, set_attribute
from lightning_sg.partition.replay import Replayed

_MOST = 1_000_000  # objects; whoever holds more, such as a whole data set, does not get all of them back
_MOST_BYTES = 1 << 28  # of numpy's arrays; a data set in memory is not copied
_PLAIN = (str, bytes, int, float, complex, Tensor, torch.dtype, torch.device, torch.Size)
#: Objects of these packages are not a step's to change, or belong to other threads.
_OTHERS = {
    *("torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", "lightning_sg"),
    *("threading", "queue", "multiprocessing", "concurrent", "asyncio", "logging", "weakref", "io"),
}


class Snapshot:
    """What is reachable from some objects: attributes, contents of containers, generators of random numbers, iterators.

    Tensors are not copied; see :class:`~lightning_sg.partition.written.Written` for these. Iterators are replaced by
    :class:`Replayed`, so that what a step takes from them comes again.

    Attributes:
        modules: The modules among the objects.

    Args:
        roots: The objects.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.modules: list[nn.Module] = []
        self._restore: list[Callable[[], Any]] = []
        self._bytes_left = _MOST_BYTES
        self._replayed: dict[int, Replayed] = {}
        self._seen: dict[int, Any] = {}
        self._waiting: deque[Any] = deque(roots)
        while self._waiting and len(self._seen) < _MOST:
            value = self._waiting.popleft()
            if value is None or isinstance(value, _PLAIN) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            self._take(value)

    def restore(self) -> None:
        """Puts everything back, last things first."""
        for replayed in self._replayed.values():
            replayed.rewind()
        for put_back in reversed(self._restore):
            put_back()

    # ------------------------------------------------------------------ by kind

    def _take(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.modules.append(value)
            self._mapping(value.__dict__)
        elif isinstance(value, dict):
            self._mapping(value)
        elif isinstance(value, list):
            self._list(value)
        elif isinstance(value, (set, deque)):
            self._collection(value)
        elif isinstance(value, (tuple, frozenset)):
            self._waiting.extend(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif not self._generator(value) and _is_plain_object(value):
            self._attributes(value)

    def _mapping(self, held: dict[str, Any]) -> None:
        own = held if isinstance(held, OrderedDict) else _Plain(held)
        before = dict(own.items())

        def put_back() -> None:
            if not _same(own, before):
                own.clear()
                own.update(before)
            for key, value in before.items():
                self._replace(value, key, own.__setitem__)

        self._restore.append(put_back)
        for key, value in before.items():
            self._follow(value, key, own.__setitem__)

    def _list(self, held: list[Any]) -> None:
        before = list(held)

        def put_back() -> None:
            if not _same(dict(enumerate(held)), dict(enumerate(before))):
                held[:] = before
            for place, value in enumerate(before):
                self._replace(value, place, held.__setitem__)

        self._restore.append(put_back)
        for place, value in enumerate(before):
            self._follow(value, place, held.__setitem__)

    def _collection(self, held: set[Any] | deque[Any]) -> None:
        before = list(held)

        def put_back() -> None:
            if _holds_same(held, before):
                return  # a set that is filled again may have another order
            held.clear()
            (held.update if isinstance(held, set) else held.extend)(before)

        self._restore.append(put_back)
        self._waiting.extend(before)

    def _array(self, held: np.ndarray[Any, Any]) -> None:
        if held.flags.writeable and held.nbytes <= self._bytes_left:
            self._bytes_left -= held.nbytes
            before = held.copy()
            self._restore.append(lambda: np.copyto(held, before))

    def _generator(self, value: Any) -> bool:
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self._restore.append(lambda: value.set_state(state))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._restore.append(_setting(bits, "state", bits.state))
        elif isinstance(value, np.random.RandomState):
            legacy = value.get_state()
            self._restore.append(lambda: value.set_state(legacy))
        elif isinstance(value, random.Random):
            numbers = value.getstate()
            self._restore.append(lambda: value.setstate(numbers))
        else:
            return False
        return True

    def _attributes(self, value: Any) -> None:
        own = getattr(value, "__dict__", {})
        if isinstance(own, dict) and own:
            self._mapping(own)
        for name, content in attributes_of(value).items():
            if name not in own:  # a slot
                self._restore.append(_setting(value, name, content, set_attribute))
                self._waiting.append(content)

    # ------------------------------------------------------------------ iterators

    def _follow(self, value: Any, key: Any, put: Callable[[Any, Any], None]) -> None:
        """Looks at what is in a container, and replaces it if it is an iterator."""
        if not Replayed.can_stand_for(value):
            self._waiting.append(value)
            return
        if id(value) not in self._replayed:
            self._seen[id(value)] = value
            self._replayed[id(value)] = Replayed(value)
        put(key, self._replayed[id(value)])

    def _replace(self, value: Any, key: Any, put: Callable[[Any, Any], None]) -> None:
        """Leaves the stand-in of an iterator that was used, as the iterator itself has gone on."""
        replayed = self._replayed.get(id(value))
        if replayed is not None:
            put(key, replayed if replayed.used else value)


class _Plain(MutableMapping[str, Any]):
    """A dict without what its class may do about it."""

    def __init__(self, held: dict[str, Any]) -> None:
        self._held = held

    def __getitem__(self, key: str) -> Any:
        return dict.__getitem__(self._held, key)

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self._held, key, value)

    def __delitem__(self, key: str) -> None:
        dict.__delitem__(self._held, key)

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self._held)

    def __len__(self) -> int:
        return dict.__len__(self._held)

    def clear(self) -> None:
        dict.clear(self._held)


def _same(held: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Whether the same objects are in the same places."""
    return list(held) == list(before) and all(held[key] is value for key, value in before.items())


def _holds_same(held: set[Any] | deque[Any], before: list[Any]) -> bool:
    """Whether the same objects are in a collection, in a deque in the same order."""
    left, right = list(map(id, held)), list(map(id, before))
    return left == right if isinstance(held, deque) else sorted(left) == sorted(right)


def _setting(value: Any, name: str, content: Any, put: Callable[[Any, str, Any], None] = setattr) -> Callable[[], None]:
    return lambda: put(value, name, content)


def _is_plain_object(value: Any) -> bool:
    """Whether the attributes of an object are a step's to change."""
    if isinstance(value, (type, Optimizer, Dataset, DataLoader)):
        return False
    return type(value).__module__.partition(".")[0] not in _OTHERS


__all__ = ["Snapshot"]
