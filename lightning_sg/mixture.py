"""Refuses a mixture of Lightning's two packages, and says which object comes from which.

Lightning itself rejects such objects before it calls anything of theirs, with messages such as "Expected a parent". So
once both packages are imported, their Trainers look at what they are given first; nothing else about them changes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.which_lightning import CHOICE, STANDALONE, TRAINING, UNIFIED, VARIABLE, is_loaded, packages_behind

#: What of Trainer's arguments must be of its own package; loggers and profilers need not.
_PARTS = ("callbacks", "strategy", "plugins")
_OURS = __name__.partition(".")[0]
#: What an object is to its Trainer, and the object.
Part = tuple[str, object]


def refuse_mixture(parts: Sequence[Part]) -> None:
    """Checks that objects which work together are of one package.

    Args:
        parts: For each object, what it is to its Trainer. What is of neither package, or of both, may be anywhere. A
            string is the name of our strategy.

    Raises:
        SyntheticGradientsError: If they are not, with what comes from which package and what to do.
    """
    members: dict[str, list[str]] = {UNIFIED: [], STANDALONE: []}
    for role, part in parts:
        packages = _packages_of(part)
        if len(packages) == 1:
            members[packages.pop()].append(f"{role} {_name_of(part)}")
    if all(members.values()):
        raise _error(members)


def _packages_of(part: object) -> set[str]:
    if isinstance(part, str):
        return {CHOICE.package}
    return packages_behind(type(part))


def _name_of(part: object) -> str:
    if isinstance(part, str):
        return repr(part)
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _error(members: dict[str, list[str]]) -> SyntheticGradientsError:
    found = "; ".join(f"from `{package}`: {', '.join(names)}" for package, names in members.items())
    return SyntheticGradientsError(
        f"Objects from Lightning's two packages do not work together. Found {found}. Either import all from "
        f"`{TRAINING[CHOICE.package]}`, as lightning_sg does because {CHOICE.reason}; or import all from "
        f"`{TRAINING[CHOICE.other]}`, before lightning_sg or with the environment variable {VARIABLE}={CHOICE.other}."
    )


def watch(*strategies: str) -> None:
    """Makes the Trainers of both packages refuse mixtures, as soon as both packages are imported.

    Args:
        *strategies: The names under which our strategy is registered. The other package's registry gets them too, for
            an error that says more than that the name is unknown.
    """
    guard = _Guard(strategies)
    if is_loaded(CHOICE.other):
        guard.install()
    else:
        sys.meta_path.insert(0, _AfterImport(TRAINING[CHOICE.other], guard.install))


class _Guard:
    """Looks at what Trainers of both packages are given, and refuses mixtures that have something of ours in them."""

    def __init__(self, strategies: Sequence[str]) -> None:
        self.strategies = strategies

    def install(self) -> None:
        """Puts the guard before the Trainers, and our strategy's names into the other package's registry."""
        for package in (CHOICE.package, CHOICE.other):
            trainer = import_module(TRAINING[package]).Trainer
            _look_first(trainer, "__init__", self.look_at_parts)
            for name in ("fit", "validate", "test", "predict"):
                _look_first(trainer, name, self.look_at_run)
        registry = import_module(f"{TRAINING[CHOICE.other]}.strategies").StrategyRegistry
        for strategy in set(self.strategies) - set(registry):
            description = f"Refused, because lightning_sg uses {CHOICE.package}"
            registry.register(strategy, functools.partial(self.refuse_name, strategy), description=description)

    def look_at_parts(self, trainer: Any, given: dict[str, Any]) -> None:
        """Looks at the arguments of a Trainer."""
        parts = [part for part in _parts(given, _PARTS) if not isinstance(part[1], str) or self._is_ours(part[1])]
        if any(self._is_ours(part) for _, part in parts):
            refuse_mixture([("the Trainer", trainer), *parts])

    def look_at_run(self, trainer: Any, given: dict[str, Any]) -> None:
        """Looks at the arguments of ``fit`` and the other entry points."""
        parts = _parts({"callbacks": trainer.callbacks, "strategy": trainer.strategy}, _PARTS)
        ours = [part for part in parts if self._is_ours(part[1])]
        if ours:
            refuse_mixture([("the Trainer", trainer), *ours, *_parts(given, ("model", "datamodule"))])

    def refuse_name(self, name: str) -> None:
        """Stands for our strategy in the other package's registry."""
        raise _error({CHOICE.package: [f"the strategy {name!r}"], CHOICE.other: ["the Trainer"]})

    def _is_ours(self, part: object) -> bool:
        if isinstance(part, str):
            return part in self.strategies
        return any(base.__module__.partition(".")[0] == _OURS for base in type(part).__mro__)


def _look_first(owner: Any, name: str, look: Callable[[Any, dict[str, Any]], None]) -> None:
    """Has a method's arguments looked at before it is called."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # which the original refuses
        look(self, given)
        return original(self, *args, **kwargs)

    setattr(owner, name, looking)


def _parts(given: dict[str, Any], names: Sequence[str]) -> Iterator[Part]:
    """The objects among arguments, those in lists one by one, each with what it is."""
    for name in names:
        value = given.get(name)
        for part in value if isinstance(value, list | tuple) else [value]:
            yield f"the {name.removesuffix('s')}", getattr(part, "_orig_mod", part)  # torch.compile wraps modules


class _AfterImport(MetaPathFinder):
    """Calls a function once a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Finds the module as the other finders do."""
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec: ModuleSpec | None = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.then)
        return spec


class _Then(Loader):
    """A loader, and what comes after it."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader = loader
        self.then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module as the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module, gives it back its loader, and calls the function."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then()


__all__ = ["refuse_mixture", "watch"]
