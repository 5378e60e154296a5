"""A pytest plugin: ``lightning`` is not there, and what tests import from it comes from ``pytorch_lightning``.

    LIGHTNING_SG_LIGHTNING=pytorch_lightning pytest -p tests.as_pytorch_lightning tests/test_strategy.py

It reaches the test process and what is forked from it, not programs that a test starts.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytorch_lightning


def other_name(name: str) -> str | None:
    """The name that a module of ``lightning`` has in the other package."""
    for unified, standalone in (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")):
        if name == unified or name.startswith(f"{unified}."):
            return standalone + name.removeprefix(unified)
    return None


class OtherPackage(MetaPathFinder, Loader):
    """Finds the modules of ``lightning`` in the other package."""

    def __init__(self) -> None:
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "lightning":
            return None
        if other_name(fullname) is None:
            raise ModuleNotFoundError(f"{fullname} is not there: the tests run with pytorch_lightning", name=fullname)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(other_name(spec.name)))
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = self.specs[module.__spec__.name]  # the import system has put its own there


assert not any(name.partition(".")[0] == "lightning" for name in sys.modules), "too late: lightning is imported"
top = ModuleType("lightning")
top.__path__ = []
vars(top).update({name: getattr(pytorch_lightning, name) for name in pytorch_lightning.__all__})
sys.modules["lightning"] = top
sys.meta_path.insert(0, OtherPackage())
