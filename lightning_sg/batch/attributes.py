"""Reads the attributes of an object of any class."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

#: Not data of a batch, even if an object of it refers to one.
_NOT_DATA = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, nn.Module, Dataset, DataLoader)


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object holds itself, by name: those in its ``__dict__`` and those in slots.

    Properties are left out, and so is everything of functions, classes, modules, datasets and data loaders.
    """
    return {} if isinstance(value, _NOT_DATA) else stored_in(value)


def stored_in(value: Any) -> dict[str, Any]:
    """The same of an object of any kind."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        for name, slot in _slots_of(kind).items():
            try:
                found[name] = slot.__get__(value, type(value))
            except AttributeError:  # it has no value yet
                continue
    return {**found, **_dict_of(value)}


def set_attribute(value: Any, name: str, content: Any) -> None:
    """Sets an attribute that :func:`attributes_of` has found, also of an object whose class forbids it."""
    own = _dict_of(value)
    if name in own:
        own[name] = content
        return
    for kind in type(value).__mro__:
        slot = _slots_of(kind).get(name)
        if slot is not None:
            slot.__set__(value, content)
            return


def _dict_of(value: Any) -> dict[str, Any]:
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return own if isinstance(own, dict) else {}


def _slots_of(kind: type) -> dict[str, Any]:
    """The slots that a class itself declares, each with its descriptor."""
    names = kind.__dict__.get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    found = {}
    for name in names:
        mangled = name.startswith("__") and not name.endswith("__")
        stored = f"_{kind.__name__.lstrip('_')}{name}" if mangled else name
        slot = kind.__dict__.get(stored)
        if hasattr(slot, "__get__") and hasattr(slot, "__set__"):
            found[stored] = slot
    found.pop("__dict__", None)
    found.pop("__weakref__", None)
    return found


__all__ = ["attributes_of", "set_attribute", "stored_in"]
