"""Checks the arguments of public classes and functions: their type, their range, and an error that names them."""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")

_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = 80

#: The most batches that an argument may count, such as a warm-up or a period: more than any training has.
MOST_BATCHES = 100_000_000
#: The longest time to wait for somebody, in seconds: 30 days.
MOST_SECONDS = 30 * 24 * 60 * 60.0
#: The most features, classes or channels that a layer may have, and the most layers of a predictor.
MOST_FEATURES = 10_000_000
MOST_LAYERS = 1_000


@dataclass(frozen=True)
class Check:
    """What an argument may be.

    Attributes:
        words: What is allowed, to follow "must be".
        take: Returns an allowed value, in the type that the package uses; raises ``TypeError`` or ``ValueError``,
            whose text is added to the error, for any other.
    """

    words: str
    take: Callable[[Any], Any]


def checked(owner: str, argument: str, value: Value, check: Check) -> Value:
    """Returns ``value`` if ``check`` allows it.

    Args:
        owner: The class or function that was called.
        argument: The name of the argument.
        value: What was given for it.
        check: What it may be.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is out of range.
    """
    try:
        taken: Value = check.take(value)
    except (TypeError, ValueError) as refused:
        more = f" {refused}" if str(refused) else ""
        kind = TypeError if isinstance(refused, TypeError) else ValueError
        raise kind(f"{owner}({argument}=...): {argument} must be {check.words}, not {_shown(value)}.{more}") from None
    return taken


def check_fields(owner: str, options: object, **checks: Check) -> None:
    """Checks the fields of a dataclass, frozen or not, as :func:`checked` does.

    Args:
        owner: The class that the user calls.
        options: The object.
        **checks: What each field may be.

    Raises:
        TypeError: If one is of another type.
        ValueError: If one is out of range.
    """
    for name, check in checks.items():
        object.__setattr__(options, name, checked(owner, name, getattr(options, name), check))


# ---------------------------------------------------------------------- single values


def whole(least: int, most: int) -> Check:
    """An integer from ``least`` to ``most``, also of numpy; no bool, and no float even if it is whole."""

    def take(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError
        integer = operator.index(value)
        return _within(integer, least <= integer <= most)

    return Check(f"a whole number from {least:,} to {most:,}", take)


def number(
    *, above: float | None = None, least: float | None = None, below: float | None = None, most: float | None = None
) -> Check:
    """A finite real number, also of numpy, within bounds that are excluded or included."""
    bounds = [
        f"{words} {bound:,g}"
        for words, bound in (("above", above), ("at least", least), ("below", below), ("at most", most))
        if bound is not None
    ]

    def take(value: Any) -> float | int:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        real = _as_float(value)
        inside = (
            math.isfinite(real)
            and (above is None or real > above)
            and (least is None or real >= least)
            and (below is None or real < below)
            and (most is None or real <= most)
        )
        return _within(value if isinstance(value, int) else real, inside)

    return Check(f"a finite number {' and '.join(bounds)}", take)


def flag() -> Check:
    """``True`` or ``False``, also of numpy."""

    def take(value: Any) -> bool:
        if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
            raise TypeError
        return bool(value)

    return Check("True or False", take)


def one_of(*names: str) -> Check:
    """One of a few strings."""

    def take(value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError
        return _within(value, value in names)

    return Check(" or ".join(filter(None, [", ".join(map(repr, names[:-1])), repr(names[-1])])), take)


def text() -> Check:
    """A string that is not empty."""

    def take(value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError
        return _within(value, bool(value))

    return Check("a string that is not empty", take)


def path() -> Check:
    """A path: a string that is not empty, or an ``os.PathLike``."""

    def take(value: Any) -> Any:
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError
        return _within(value, bool(os.fspath(value)))

    return Check("a path", take)


def instance(*kinds: type, words: str = "") -> Check:
    """An instance of one of some classes."""
    names = " or ".join(kind.__name__ for kind in kinds)

    def take(value: Any) -> Any:
        if not isinstance(value, kinds):
            is_class = isinstance(value, type) and issubclass(value, kinds)
            raise TypeError(f"That is the class; make an instance, {value.__name__}(...)." if is_class else "")
        return value

    return Check(words or f"an instance of {names}", take)


def function(words: str) -> Check:
    """Anything that can be called.

    Args:
        words: What it is to be, such as "a function of the batch".
    """

    def take(value: Any) -> Any:
        if not callable(value):
            raise TypeError
        return value

    return Check(words, take)


def which_samples() -> Check:
    """One answer for all samples, or a bool tensor with one for each."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            if str(value.dtype) != "torch.bool":
                raise TypeError(f"Its dtype is {value.dtype}.")
            return value
        return flag().take(value)

    return Check("True or False, or a bool tensor with one for each sample", take)


# ---------------------------------------------------------------------- compositions


def optional(check: Check) -> Check:
    """What ``check`` allows, or ``None``."""
    return Check(f"{check.words}, or None", lambda value: None if value is None else check.take(value))


def either(*checks: Check) -> Check:
    """What any of ``checks`` allows."""

    def take(value: Any) -> Any:
        kind: type[Exception] = TypeError
        for check in checks:
            try:
                return check.take(value)
            except (TypeError, ValueError) as refused:
                kind = ValueError if isinstance(refused, ValueError) else kind
        raise kind

    return Check(", or ".join(check.words for check in checks), take)


def listed(check: Check, words: str) -> Check:
    """A list or tuple of what ``check`` allows.

    Args:
        check: What each entry may be.
        words: What the list is, such as "a list of names".
    """

    def take(value: Any) -> Any:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TypeError
        for entry in value:
            _entry(f"The entry {_shown(entry)} is not", check, entry)
        return value

    return Check(words, take)


def by_name(check: Check, words: str) -> Check:
    """A dict from strings to what ``check`` allows.

    Args:
        check: What each value may be.
        words: What the dict is, such as "a dict of numbers by name".
    """

    def take(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"The name {_shown(name)} is not a string.")
        taken = {name: _entry(f"That of {name!r}, {_shown(each)}, is not", check, each) for name, each in value.items()}
        return taken if isinstance(value, dict) else value

    return Check(words, take)


def context_source() -> Check:
    """A key or an index of the batch, or a function of it."""
    return either(text(), Check("an index", whole(-1_000_000, 1_000_000).take), function("a function of the batch"))


def _entry(start: str, check: Check, value: Any) -> Any:
    try:
        return check.take(value)
    except (TypeError, ValueError) as refused:
        kind = TypeError if isinstance(refused, TypeError) else ValueError
        raise kind(f"{start} {check.words}.") from None


def _within(value: Value, inside: bool) -> Value:
    if not inside:
        raise ValueError
    return value


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number that no float can hold
        return math.inf


def _shown(value: object) -> str:
    """A value on one line."""
    if isinstance(value, type):
        return value.__name__
    try:
        shown = _REPR.repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        return "<int of more than a thousand digits>"
    plain = isinstance(value, (str, bytes, int, float, list, tuple, dict, set))
    return shown if plain or "..." not in shown else f"<{type(value).__name__}>"


__all__ = [
    "MOST_BATCHES",
    "MOST_FEATURES",
    "MOST_LAYERS",
    "Check",
    "by_name",
    "check_fields",
    "checked",
    "context_source",
    "either",
    "flag",
    "function",
    "instance",
    "listed",
    "number",
    "one_of",
    "optional",
    "path",
    "text",
    "which_samples",
    "whole",
]
