"""Models of other people's packages train unchanged, decoupled, in one process and in two.

``make test-clients`` installs the packages and runs these; elsewhere they are skipped.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clients.runs import CLIENTS, Run

ROOT = Path(__file__).parents[2]
RUNS = ("plain", "callback", "split", "auto", "auto in one")
DECOUPLED = RUNS[1:]


def wanted(name: str) -> bool:
    try:
        return bool(version(CLIENTS[name].distribution)) and "LIGHTNING_SG_TEST_CLIENTS" in os.environ
    except PackageNotFoundError:
        return False


def case(name: str) -> Any:
    skip = pytest.mark.skipif(not wanted(name), reason=f"needs {CLIENTS[name].distribution}: `make test-clients`")
    return pytest.param(name, marks=[skip, pytest.mark.clients, pytest.mark.xdist_group(name)])


@pytest.fixture(scope="module", params=[case(name) for name in CLIENTS])
def client(request: pytest.FixtureRequest) -> str:
    """The client's name."""
    return request.param


@pytest.fixture(scope="module")
def results(client: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all runs of the client gave."""
    out = tmp_path_factory.mktemp("client") / "runs.pickle"
    command = [sys.executable, "-m", "tests.clients", client, str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return pickle.loads(out.read_bytes())


def ranks_of(results: dict[str, Any], name: str) -> list[Run]:
    """The run of each rank; the test fails if the run did."""
    result = results.get(name)
    ranks = result if isinstance(result, list) else [result]
    for rank in ranks:
        if not isinstance(rank, Run):
            pytest.fail(f"The run '{name}' failed: {getattr(rank, 'trace', None) or rank}", pytrace=False)
    return ranks


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    both = [(left[key].double(), right[key].double()) for key in left if left[key].numel()]
    return max(float((one - other).abs().max()) for one, other in both)


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_and_its_loss_falls(results: dict[str, Any], name: str) -> None:
    losses = ranks_of(results, name)[0].by_epoch
    assert all(torch.isfinite(torch.tensor(losses)))
    third = max(len(losses) // 3, 1)
    parts = [sum(losses[start : start + third]) for start in (0, len(losses) - third)]
    assert parts[1] < 0.95 * parts[0]


@pytest.mark.parametrize(("several", "one"), [("split", "callback"), ("auto", "auto in one")])
def test_two_processes_end_with_the_weights_of_one(results: dict[str, Any], several: str, one: str) -> None:
    (expected,) = ranks_of(results, one)
    for rank in ranks_of(results, several):
        assert rank.boundaries == expected.boundaries
        assert largest_difference(expected.state, rank.state) <= 1e-6


@pytest.mark.parametrize("name", RUNS)
def test_the_package_loads_what_was_saved(results: dict[str, Any], name: str) -> None:
    first = ranks_of(results, name)[0]
    assert first.loaded is not None
    assert largest_difference(first.state, first.loaded) == 0


@pytest.mark.parametrize("name", DECOUPLED)
def test_predictors_say_what_they_predict_from_or_are_cheap_and_warn(results: dict[str, Any], name: str) -> None:
    ranks = ranks_of(results, name)
    expected = ranks[0].context
    said = [line for rank in ranks for line in rank.said if "predicts from" in line]
    if expected:
        assert any(re.search(rf"predicts from (.*, )?{re.escape(expected)}[,.]", line) for line in said), said
        return
    assert any("context=" in line for rank in ranks for line in rank.warned)
    for rank in ranks:
        assert sum(rank.predictors.values()) <= 0.1 * rank.parameters


@pytest.mark.parametrize("name", DECOUPLED)
def test_a_predictor_above_a_quarter_of_its_model_warns(results: dict[str, Any], name: str) -> None:
    for rank in ranks_of(results, name):
        for boundary, size in rank.predictors.items():
            if size > 0.25 * rank.parameters:
                assert any(f"'{boundary}'" in line and "%" in line for line in rank.warned), rank.warned


def test_every_client_has_its_pin() -> None:
    pins = (ROOT / "tests" / "clients" / "requirements.txt").read_text()
    named = re.findall(r"^([\w.-]+)==", pins, flags=re.MULTILINE)
    assert {entry.distribution for entry in CLIENTS.values()} <= {*named, "lightning"}
    assert not {"torch", "lightning"} & set(named)
