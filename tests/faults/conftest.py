"""One warm process for the trainings of all these tests, and the weights of a training that nothing disturbs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from benchmarks.faults.campaign import Undisturbed
from benchmarks.faults.warm import Warm, warmed


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    assert subprocess  # named here, because the processes are started elsewhere: see tests/conftest.py
    with warmed() as process:
        yield process


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))
