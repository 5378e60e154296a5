"""``--sg.*``: options of the callback on the command line, whatever the configuration says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sg import AlignmentGuard, LossModelPredictor, MLPPredictor, SyntheticGradients, ZeroPredictor
from lightning_sg.cli import main
from lightning_sg.settings import Settings

ROOT = Path(__file__).parents[2]
CONFIG = "configs/digits_2stages.yaml"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """The settings of the one callback that a trainer has for some arguments."""
    made: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["lightning-sg"])
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda trainer, *args, **kwargs: made.append(trainer))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> Settings:
        main(["fit", *arguments, "--trainer.logger=false"])
        [callback] = [each for each in made.pop().callbacks if isinstance(each, SyntheticGradients)]
        found: Settings = callback.settings
        return found

    return run


def test_an_option_changes_only_itself(settings: Callable[..., Settings]) -> None:
    before = settings("--config", CONFIG)
    after = settings("--config", CONFIG, "--sg.delay", "3", "--sg.exact.every=16")
    assert (before.delay, after.delay) == (1, 3)
    assert (before.exact.every, after.exact.every) == (8, 16)
    assert after.exact.bootstrap == before.exact.bootstrap
    assert isinstance(after.predictor, LossModelPredictor)
    assert after.predictor.hidden == 128
    assert after.training.optimizer is not None


def test_a_default_takes_the_place_of_what_the_configuration_says(settings: Callable[..., Settings]) -> None:
    """Sweeps pass values that happen to be defaults."""
    assert settings("--config", CONFIG, "--sg.predictor", "auto").predictor == "auto"
    assert settings("--config", CONFIG, "--sg.training.optimizer", "null").training.optimizer is None


def test_objects_are_replaced_or_changed(settings: Callable[..., Settings]) -> None:
    other = settings("--config", CONFIG, "--sg.predictor=lightning_sg.MLPPredictor", "--sg.predictor.hidden=32")
    assert isinstance(other.predictor, MLPPredictor)
    assert other.predictor.hidden == 32
    rule = settings("--config", CONFIG, "--sg.predictor=lightning_sg.ZeroPredictor", "--sg.guard=null")
    assert isinstance(rule.predictor, ZeroPredictor)
    assert rule.guard is None
    guard = settings("--config", CONFIG, "--sg.guard.threshold=0.2").guard
    assert isinstance(guard, AlignmentGuard)
    assert guard.threshold == 0.2


def test_a_configuration_without_the_callback_gets_one(settings: Callable[..., Settings], tmp_path: Path) -> None:
    text = yaml.safe_load((ROOT / CONFIG).read_text())
    del text["trainer"]["callbacks"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(text))
    assert settings("--config", str(tmp_path / "plain.yaml"), "--sg.delay=4").delay == 4


def test_several_configurations_and_a_section_of_them(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("sg:\n  delay: 5\n  exact:\n    warm_up: 7\n")
    found = settings("--config", CONFIG, "--config", str(tmp_path / "more.yaml"), "--sg.exact.warm_up=9")
    assert (found.delay, found.exact.warm_up) == (5, 9)


def test_a_printed_configuration_says_the_same(
    settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", CONFIG, "--sg.delay=3", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    found = settings("--config", str(tmp_path / "printed.yaml"))
    assert found.delay == 3
    assert isinstance(found.predictor, LossModelPredictor)


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_the_sweep_file_names_options_that_exist(settings: Callable[..., Settings], place: int) -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / "digits_wandb.yaml").read_text())
    values = {name: each["values"][place] for name, each in sweep["parameters"].items()}
    config = [word for word in sweep["command"] if word.startswith("--config")]
    found = settings(*config, *(f"--{name}={value}" for name, value in values.items()))
    assert (found.delay, found.exact.every) == (values["sg.delay"], values["sg.exact.every"])
    assert type(found.predictor).__name__ == values["sg.predictor"].split(".")[-1]


def test_wrong_values_are_refused(settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        settings("--config", CONFIG, "--sg.delay", "soon")
    assert ended.value.code == 2
    assert "sg.delay" in capsys.readouterr().err
