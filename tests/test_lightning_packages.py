"""Lightning's two packages: which is taken, that training is the same under both, and that a mixture is refused."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sg import lightning_api, which_lightning
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.which_lightning import choose
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning", "pytorch_lightning")
TRAINING = which_lightning.TRAINING


def run(*command: str, choice: str | None = None) -> str:
    """Runs Python in a process of its own, with the choice in its environment; what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.update(OMP_NUM_THREADS="1", MASTER_PORT=str(free_port()), PYTHONPATH=str(ROOT))
    if choice is not None:
        environment["LIGHTNING_SG_LIGHTNING"] = choice
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


# ---------------------------------------------------------------------- which one is taken


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has only these packages imported."""

    def only(*packages: str) -> None:
        for name in TRAINING.values():
            monkeypatch.delitem(sys.modules, name, raising=False)
        for package in packages:
            monkeypatch.setitem(sys.modules, TRAINING[package], ModuleType(TRAINING[package]))

    return only


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has only these packages installed."""

    def only(*packages: str) -> None:
        monkeypatch.setattr(which_lightning, "_is_installed", lambda package: package in packages)

    return only


def described(*packages: str) -> list[dict[str, Any]]:
    """A module's variables: classes derived from these packages' modules, as a user's program has them."""
    bases = {package: type("Base", (), {"__module__": f"{TRAINING[package]}.core"}) for package in packages}
    classes = {f"Net{number}": type("Net", (base,), {}) for number, base in enumerate(bases.values())}
    return [{"__name__": "users.module", "number": 3, **classes}]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_variable_comes_first(package: str, imported: Any) -> None:
    imported(*PACKAGES)
    choice = choose({"LIGHTNING_SG_LIGHTNING": package}, described("lightning"))
    assert choice.package == package
    assert "LIGHTNING_SG_LIGHTNING" in choice.reason


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"LIGHTNING_SG_LIGHTNING is 'pl', .*'pytorch_lightning'"):
        choose({"LIGHTNING_SG_LIGHTNING": "pl"}, [])


def test_a_variable_with_a_package_that_is_missing_says_so(imported: Any, installed: Any) -> None:
    imported("lightning")
    installed("lightning")
    with pytest.raises(SyntheticGradientsError, match="'pytorch_lightning', which is not installed"):
        choose({"LIGHTNING_SG_LIGHTNING": "pytorch_lightning"}, [])


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_comes_before_what_is_installed(package: str, imported: Any, installed: Any) -> None:
    imported(package)
    installed(*PACKAGES)
    assert choose({"LIGHTNING_SG_LIGHTNING": ""}, []).package == package


@pytest.mark.parametrize("package", PACKAGES)
def test_of_two_that_are_imported_the_importing_module_decides(package: str, imported: Any) -> None:
    imported(*PACKAGES)
    ambiguous, outermost = described(*PACKAGES), described("lightning")
    assert choose({}, [{}, *ambiguous, *described(package), *outermost]).package == package


def test_the_importing_module_may_have_a_module_a_class_or_a_function(imported: Any) -> None:
    imported(*PACKAGES)

    def seed_everything() -> None:
        pass

    seed_everything.__module__ = "lightning_fabric.utilities.seed"
    for value in (
        ModuleType("pytorch_lightning.callbacks"),
        described("pytorch_lightning")[0]["Net0"],
        seed_everything,
    ):
        assert choose({}, [{"value": value}]).package == "pytorch_lightning"


@pytest.mark.parametrize("package", PACKAGES)
def test_of_two_that_the_importing_modules_do_not_tell_it_is_the_one_that_models_are_made_with(
    package: str, imported: Any
) -> None:
    imported(*PACKAGES)
    bases = {}
    for name in PACKAGES:
        bases[name] = type("LightningModule", (), {"__module__": f"{TRAINING[name]}.core"})
        # Lightning's own models do not count.
        _demo = type("Demo", (bases[name],), {"__module__": f"{TRAINING[name]}.demos"})
        sys.modules[TRAINING[name]].LightningModule = bases[name]  # type: ignore[attr-defined]
        bases[f"{name} demo"] = _demo
    assert choose({}, [{}]).package == "lightning"
    model = type("Forecaster", (bases[f"{package} demo"],), {"__module__": "forecasts.models"})
    choice = choose({}, [{}])
    assert choice.package == package
    assert "forecasts.models.Forecaster is made with this one" in choice.reason
    (other,) = {*PACKAGES} - {package}
    others = type("Classifier", (bases[other],), {"__module__": "classes.models"})
    assert choose({}, [{}]).package == "lightning"
    del model, others


def test_of_two_that_nobody_uses_it_is_lightning(imported: Any) -> None:
    imported(*PACKAGES)
    assert choose({}, [{}, *described(*PACKAGES)]).package == "lightning"


def test_of_what_is_installed_lightning_comes_first(imported: Any, installed: Any) -> None:
    imported()
    for packages, expected in ((PACKAGES, "lightning"), (PACKAGES[1:], "pytorch_lightning")):
        installed(*packages)
        assert choose({}, []).package == expected
    installed()
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        choose({}, [])


def test_a_folder_named_lightning_is_not_the_package(imported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    imported("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    assert choose({}, []).package == "pytorch_lightning"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_program_decides_although_a_library_has_imported_the_other(package: str, tmp_path: Path) -> None:
    other = next(each for each in PACKAGES if each != package)
    (tmp_path / "library.py").write_text(f"import {TRAINING[other]}\nclass Forecast: ...\n")
    (tmp_path / "own.py").write_text(
        f"from {TRAINING[package]} import LightningModule\nclass Net(LightningModule): ...\n"
    )
    program = tmp_path / "program.py"
    program.write_text(
        "from library import Forecast\nfrom own import Net\n"
        "def later():\n    import lightning_sg\n    return lightning_sg.SyntheticGradients.__mro__[1].__module__\n"
        "print(later())\n"
    )
    assert run(str(program)).splitlines()[-1] == f"{TRAINING[package]}.callbacks.callback"


def test_both_packages_give_the_same_names() -> None:
    tree = ast.parse(Path(lightning_api.__file__).read_text())
    (branch,) = [node for node in tree.body if isinstance(node, ast.If) and node.orelse]
    unified, standalone = ("\n".join(map(ast.unparse, body)) for body in (branch.body, branch.orelse))
    renamed = unified.replace("lightning.pytorch", "pytorch_lightning").replace("lightning.fabric", "lightning_fabric")
    assert sorted(renamed.splitlines()) == sorted(standalone.splitlines())


# ---------------------------------------------------------------------- training under each


def state(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)


def program(package: str, folder: Path, task: str) -> None:
    """A user's program under one package, in ``folder``."""
    folder.mkdir(exist_ok=True)
    run("-m", "tests.either_package", package, str(folder), task)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the callback in one process, under ``lightning``."""
    folder = tmp_path_factory.mktemp("plain")
    program("lightning", folder, "fit")
    return folder


@pytest.mark.parametrize("task", ["fit", "popen", "spawn", "cli"])
def test_pytorch_lightning_trains_to_the_same_bits(task: str, plain: Path, tmp_path: Path) -> None:
    program("pytorch_lightning", tmp_path, task)
    expected, found = state(plain), state(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for bases in tmp_path.glob("bases-*"):
        assert "pytorch_lightning.callbacks.callback" in bases.read_text()
    assert len(list(tmp_path.glob("bases-*"))) == (2 if task == "popen" else 1)


@pytest.mark.parametrize(("first", "second"), [PACKAGES, PACKAGES[::-1]])
def test_a_checkpoint_resumes_under_either_package(first: str, second: str, plain: Path, tmp_path: Path) -> None:
    program(first, tmp_path, "half")
    program(second, tmp_path, "fit")
    expected, found = state(plain), state(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_oracle_and_the_strategy_hold_under_pytorch_lightning() -> None:
    output = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.as_pytorch_lightning"),
        "tests/distributed/test_split_equals_one_process.py::test_one_two_and_four_processes_end_with_the_same_weights",
        "tests/test_strategy.py",
        "tests/test_compat.py",
        choice="pytorch_lightning",
    )
    assert "passed" in output


MODEL = "import pytorch_lightning as pl\nclass Net(pl.LightningModule):\n    def __init__(self, width: int = 4): ...\n"


def command(folder: Path, choice: str) -> subprocess.CompletedProcess[str]:
    """``lightning-sg fit --print_config`` on a module of ``pytorch_lightning``."""
    (folder / "users_own.py").write_text(MODEL)
    return subprocess.run(
        [sys.executable, "-m", "lightning_sg", "fit", "--model=users_own.Net", "--print_config"],
        cwd=folder,
        env={**os.environ, "LIGHTNING_SG_LIGHTNING": choice, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_command_takes_the_package_that_the_variable_names(tmp_path: Path) -> None:
    ended = command(tmp_path, "pytorch_lightning")
    assert ended.returncode == 0, ended.stderr
    assert "width: 4" in ended.stdout


def test_the_command_says_so_if_a_configuration_is_of_the_other_package(tmp_path: Path) -> None:
    ended = command(tmp_path, "lightning")
    assert ended.returncode == 2
    assert "LIGHTNING_SG_LIGHTNING=pytorch_lightning" in ended.stderr.splitlines()[-1]


# ---------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(
    ("imports", "choice", "package"),
    [
        pytest.param(["lightning_sg"], None, "lightning", id="lightning_sg is imported before both"),
        pytest.param(["lightning.pytorch", "lightning_sg"], None, "lightning", id="pytorch_lightning comes later"),
        pytest.param(["pytorch_lightning", "lightning_sg"], None, "pytorch_lightning", id="lightning comes later"),
        pytest.param([], "pytorch_lightning", "pytorch_lightning", id="both are imported before lightning_sg"),
    ],
)
def test_a_mixture_is_refused_by_name(imports: list[str], choice: str | None, package: str) -> None:
    found = json.loads(run("-m", "tests.mixtures", *imports, choice=choice).splitlines()[-1])
    assert found["package"] == package
    assert all(not outcome for outcome in found["working"].values()), found["working"]
    other = next(each for each in PACKAGES if each != package)
    for name, outcome in found["mixtures"].items():
        assert outcome, f"{name} is not refused"
        kind, message = outcome
        assert kind == "SyntheticGradientsError", f"{name}: {kind}: {message}"
        assert message.index("from `lightning`: the") < message.index("from `pytorch_lightning`: the"), name
        assert f"LIGHTNING_SG_LIGHTNING={other}" in message, name
        assert all(f"import all from `{module}`" in message for module in TRAINING.values()), name
    assert "the callback lightning_sg.callback.SyntheticGradients" in found["mixtures"]["a callback in a list"][1]
    assert "the strategy 'synthetic_gradients'" in found["mixtures"]["a strategy's name"][1]
    assert f"from `{other}`: the model __main__." in found["mixtures"]["a module to fit"][1]
