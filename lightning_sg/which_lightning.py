"""Chooses which of Lightning's two packages to use: the one that the user's code imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from lightning_sg.errors import SyntheticGradientsError

#: The environment variable that says which of the two to use.
VARIABLE = "LIGHTNING_SG_LIGHTNING"
UNIFIED, STANDALONE = "lightning", "pytorch_lightning"
#: The module that has the Trainer, by package. ``lightning`` itself may also be a folder of the user's.
TRAINING = {UNIFIED: "lightning.pytorch", STANDALONE: "pytorch_lightning"}
#: The package that a module belongs to, by the first part of its name.
_FAMILIES = {
    "lightning": UNIFIED,
    "pytorch_lightning": STANDALONE,
    "lightning_fabric": STANDALONE,
}


@dataclass(frozen=True)
class Choice:
    """One of Lightning's two packages.

    Attributes:
        package: ``"lightning"`` or ``"pytorch_lightning"``.
        reason: Why it was chosen, to follow "because".
    """

    package: str
    reason: str

    @property
    def other(self) -> str:
        """The package that was not chosen."""
        return STANDALONE if self.package == UNIFIED else UNIFIED


def choose(environment: Mapping[str, str], namespaces: Iterable[Mapping[str, Any]]) -> Choice:
    """Chooses the package: by environment variable, by what is imported, or else by what is installed.

    Libraries may have imported one package while the user's own code imports the other. If both are there, the
    innermost of the importing modules that uses exactly one of them decides. If none does, it is the package whose
    LightningModule the imported libraries build on, if they build on one only.

    Args:
        environment: The environment variables.
        namespaces: The variables of the modules that are importing lightning_sg, innermost first.

    Raises:
        SyntheticGradientsError: If the variable names no package, or one that is not installed.
        ModuleNotFoundError: If neither is installed.
    """
    named = environment.get(VARIABLE)
    if named:
        return _named(named)
    loaded = [package for package in TRAINING if is_loaded(package)]
    if len(loaded) == 1:
        return Choice(loaded[0], "it was imported before lightning_sg")
    if loaded:
        return (
            _used_in(namespaces)
            or _built_on()
            or Choice(
                UNIFIED,
                "both packages were imported before lightning_sg, and neither the modules that import it nor the "
                "models of other libraries tell which is meant",
            )
        )
    for package in TRAINING:
        if _is_installed(package):
            return Choice(package, "neither package was imported before lightning_sg, and this one is installed")
    raise ModuleNotFoundError('lightning_sg needs Lightning: pip install "lightning>=2.5"')


def _named(package: str) -> Choice:
    if package not in TRAINING:
        raise SyntheticGradientsError(
            f"The environment variable {VARIABLE} is {package!r}, but must be {UNIFIED!r} or {STANDALONE!r}: the "
            "package that your code imports Lightning from."
        )
    if not is_loaded(package) and not _is_installed(package):
        raise SyntheticGradientsError(
            f"The environment variable {VARIABLE} is {package!r}, which is not installed. Install it, or unset the "
            "variable."
        )
    return Choice(package, f"the environment variable {VARIABLE} says so")


def _used_in(namespaces: Iterable[Mapping[str, Any]]) -> Choice | None:
    for namespace in namespaces:
        used = {package for value in tuple(namespace.values()) for package in _packages_of_variable(value)}
        if len(used) == 1:
            name = namespace.get("__name__", "the importing module")
            return Choice(used.pop(), f"both packages were imported before lightning_sg, and {name} uses this one")
    return None


def _built_on() -> Choice | None:
    """The one package that somebody's models are made with; a library may import the other for a callback only."""
    models = {package: _models_of(package) for package in TRAINING}
    used = [package for package, found in models.items() if found]
    if len(used) != 1:
        return None
    model = models[used[0]][0]
    return Choice(
        used[0],
        f"both packages were imported before lightning_sg, and {model.__module__}.{model.__qualname__} is made with "
        "this one",
    )


def _models_of(package: str) -> list[type]:
    """The LightningModules of this package that are defined elsewhere."""
    base = getattr(sys.modules[TRAINING[package]], "LightningModule", None)
    waiting = [] if base is None else [base]
    found = []
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if package_of(str(kind.__module__)) is None:
            found.append(kind)
    return found


def _packages_of_variable(value: object) -> set[str]:
    if isinstance(value, ModuleType):
        package = package_of(value.__name__)
        return {package} if package else set()
    if isinstance(value, type):
        return packages_behind(value)
    if isinstance(value, FunctionType):
        package = package_of(value.__module__ or "")
        return {package} if package else set()
    return set()


def packages_behind(kind: type) -> set[str]:
    """Lightning's packages that a class, or what it inherits from, is defined in."""
    return {package for base in kind.__mro__ if (package := package_of(str(base.__module__)))}


def package_of(module: str) -> str | None:
    """The package that a module of Lightning's belongs to; ``lightning_fabric`` belongs to ``pytorch_lightning``."""
    return _FAMILIES.get(module.partition(".")[0])


def is_loaded(package: str) -> bool:
    """Whether the package has been imported."""
    return sys.modules.get(TRAINING[package]) is not None


def _is_installed(package: str) -> bool:
    try:
        return find_spec(TRAINING[package]) is not None
    except (ImportError, ValueError):  # without its parent; or blocked in sys.modules
        return False


def _importing() -> Iterator[Mapping[str, Any]]:
    """The variables of the modules and functions that are importing this package, innermost first."""
    frame = sys._getframe()
    ours = __name__.partition(".")[0]
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in (ours, "importlib"):
            yield frame.f_locals
            if frame.f_locals is not frame.f_globals:
                yield frame.f_globals
        frame = frame.f_back  # type: ignore[assignment]


#: What this process uses. It stays, because the classes of this package inherit from those of Lightning.
CHOICE = choose(os.environ, _importing())

__all__ = [
    "CHOICE",
    "STANDALONE",
    "TRAINING",
    "UNIFIED",
    "VARIABLE",
    "Choice",
    "choose",
    "is_loaded",
    "package_of",
    "packages_behind",
]
