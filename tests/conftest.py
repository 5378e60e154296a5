"""One thread a process, no output from Lightning that hides the tests' own, a mark on tests that start processes."""

import gc
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

#: Programs that import Lightning's other package, which then writes the log of both.
collect_ignore = ["either_package.py", "mixtures.py", "as_pytorch_lightning.py"]


#: What Lightning's launchers and our strategy set in the process that they run in.
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LIGHTNING_SG_LIGHTNING")


@pytest.fixture(autouse=True)
def no_launcher_around() -> Iterator[None]:
    """Removes what a launcher has set, in an earlier test or in this one.

    A program that a later test starts would otherwise take itself for one of a launcher's processes, start no others,
    and wait for them.
    """
    for name in LAUNCHED:
        os.environ.pop(name, None)
    yield
    for name in LAUNCHED:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that start processes, which take most of the time: ``make check`` does without them.

    Such a test runs once more when it fails, as a busy machine may keep one of its processes from its time limits. The
    end of the log lists it as RERUN. It may be a race, so look for the cause.
    """
    for item in items:
        if isinstance(item, pytest.Function) and any(starts_processes(each) for each in functions_of(item)):
            item.add_marker(pytest.mark.processes)
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection_finish() -> None:
    """Spares each start of ranks a look for garbage in all that torch, Lightning and the tests have made until now."""
    gc.collect()
    gc.freeze()


def functions_of(item: pytest.Function) -> Iterator[Callable[..., Any]]:
    """The test itself and its fixtures."""
    yield item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield from (definition.func for definition in definitions)


def starts_processes(function: Callable[..., Any]) -> bool:
    """Whether ``run_ranks``, ``subprocess`` or the service of Weights & Biases, a process, is used by ``function``.

    What it calls in this repository counts, too.
    """
    seen: set[Any] = set()
    pending: list[Any] = [function]
    while pending:
        each = pending.pop()
        if not isinstance(each, FunctionType) or each in seen or ROOT not in Path(each.__code__.co_filename).parents:
            continue
        seen.add(each)
        names = list(names_in(each.__code__))
        used = [each.__globals__.get(name) for name in names]
        if "WandbLogger" in names or any(value is run_ranks or value is subprocess for value in used):
            return True
        pending += used
    return False


def names_in(code: CodeType) -> Iterator[str]:
    """The globals and attributes that a function names, those of functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
