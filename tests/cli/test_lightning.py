"""Lightning's commands: every configuration is valid, help is documented, and two processes start and end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_sg import (
    LossModelPredictor,
    MLPInputPredictor,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
    cli,
)
from lightning_sg.cli import lightning
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run_cli(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``python -m lightning_sg`` with ``arguments``; returns when no process holds its output any more."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "MASTER_"))}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "lightning_sg", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line prints for arguments with which it prints something and ends."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    return captured.out


@pytest.fixture(autouse=True)
def no_own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sg"])


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


def test_there_are_configurations():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_configuration_is_valid(config, command, at_root, capsys):
    text = printed(capsys, command, "--config", str(config), "--print_config")
    assert "class_path: lightning_sg.SyntheticGradients" in text
    assert "class_path: examples." in text


def test_nested_predictor_is_made(at_root, monkeypatch):
    made = []
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda trainer, *args, **kwargs: made.append(trainer))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    cli.main(["fit", f"--config={ROOT / 'configs' / 'digits_2stages.yaml'}", "--trainer.logger=false"])
    [trainer] = made
    assert isinstance(trainer.strategy, SyntheticGradientStrategy)
    assert trainer.strategy.timeout == 60.0
    [callback] = [callback for callback in trainer.callbacks if isinstance(callback, SyntheticGradients)]
    assert isinstance(callback.settings.predictor, LossModelPredictor)
    assert callback.settings.predictor.hidden == 128
    assert callback.settings.predictor.objective == "both"


def test_nested_input_predictor_is_made(at_root, monkeypatch):
    made = []
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda trainer, *args, **kwargs: made.append(trainer))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    cli.main(["fit", f"--config={ROOT / 'configs' / 'mnist_unlocked.yaml'}", "--trainer.logger=false"])
    [callback] = [callback for callback in made[0].callbacks if isinstance(callback, SyntheticGradients)]
    settings = callback.settings.inputs
    assert isinstance(settings, SyntheticInputs)
    assert isinstance(settings.predictor, MLPInputPredictor)
    assert (settings.predictor.hidden, settings.warm_up) == (256, 20)
    assert settings.optimizer is not None
    optimizer = settings.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["lr"] == 3e-3


def test_printed_configuration_documents_everything_and_can_be_read_back(at_root, capsys, tmp_path):
    digits = ("--model=examples.digits.DigitsClassifier", "--data=examples.digits.Digits")
    callback = ("--trainer.callbacks=lightning_sg.SyntheticGradients", "--trainer.strategy=synthetic_gradients")
    predictor = "--trainer.callbacks.predictor=lightning_sg.LossModelPredictor"
    options = ("--trainer.callbacks.exact.every=7", "--trainer.callbacks.training.updates=3")
    text = printed(capsys, "fit", *digits, callback[0], predictor, *options, callback[1], "--print_config=comments")
    assert "Extra steps before a predictor learns from a target" in text
    assert "The width of the head's hidden layers" in text
    assert "Unable to serialize" not in text
    (tmp_path / "printed.yaml").write_text(text)
    text = printed(capsys, "fit", f"--config={tmp_path / 'printed.yaml'}", "--print_config")
    assert "lightning_sg.LossModelPredictor" in text
    assert "every: 7" in text
    assert "updates: 3" in text


def test_help_documents_callback_and_strategy(at_root, capsys):
    text = printed(capsys, "fit", "--trainer.callbacks.help=lightning_sg.SyntheticGradients")
    for argument in ("boundaries", "predictor", "delay", "context"):
        assert f"--trainer.callbacks.{argument}" in text
    assert "late" in text
    for argument in ("every", "bootstrap", "correction", "warm_up"):
        assert f"--trainer.callbacks.exact.{argument}" in text
    for argument in ("optimizer", "lr_scheduler", "every", "updates", "ema", "bound", "seed"):
        assert f"--trainer.callbacks.training.{argument}" in text
    assert "Makes a predictor's optimizer from its parameters" in text
    assert "lightning_sg.LossModelPredictor" in text
    text = printed(capsys, "fit", "--trainer.strategy.help=lightning_sg.SyntheticGradientStrategy")
    assert "How many seconds a stage waits for its neighbour" in text


def test_help_documents_predictor_and_optimizer(at_root, capsys):
    callback = "--trainer.callbacks=lightning_sg.SyntheticGradients"
    text = printed(capsys, "fit", callback, "--trainer.callbacks.predictor.help=lightning_sg.LossModelPredictor")
    assert "The width of the head's hidden layers." in text
    text = printed(capsys, "fit", callback, "--trainer.callbacks.training.optimizer.help=torch.optim.Adam")
    assert "--training.optimizer.lr" in text


HELP = (
    ["fit", "--help"],
    ["plan", "--help"],
    ["fit", "--trainer.callbacks.help=lightning_sg.SyntheticGradients"],
    ["fit", "--trainer.strategy.help=lightning_sg.SyntheticGradientStrategy"],
    ["fit", "--sg.predictor.help=lightning_sg.AutoPredictor"],
)


@pytest.mark.parametrize("arguments", HELP, ids=lambda words: words[-1].split(".")[-1])
def test_help_is_for_people_who_have_not_seen_the_source(arguments, at_root, capsys):
    text = printed(capsys, *arguments)
    assert not re.findall(r":[a-z]+:`", text)
    assert not re.findall(r"lightning_sg(?:\.\w+){2,}", text)
    assert text.startswith("usage: lightning-sg ")
    assert text.index("\n\n") < 100  # no wall of all options as usage


def test_comments_of_a_printed_configuration_have_no_markup(at_root, capsys):
    text = printed(capsys, "fit", "--config=configs/digits_2stages.yaml", "--print_config=comments")
    assert "When exact gradients travel up" in text
    assert not re.findall(r".*:[a-z]+:`.*", text)


def test_a_misspelt_option_is_recognized(at_root, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config=configs/digits_2stages.yaml", "--sg.dellay=3"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Did you mean --sg.delay?" in said
    assert "lightning-sg fit --help" in said
    assert len(said.splitlines()) < 8


def test_without_jsonargparse_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(lightning, "JSONARGPARSE", False)
    with pytest.raises(SystemExit, match=r'pip install "lightning-sg\[cli\]"'):
        cli.main(["fit"])


def test_installed_script_finds_classes_in_the_current_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "users_own.py").write_text(
        "import lightning.pytorch as pl\n\n\nclass Model(pl.LightningModule):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert "class_path: users_own.Model" in printed(capsys, "fit", "--model=users_own.Model", "--print_config")


@pytest.mark.timeout(240)
def test_two_processes_fit_and_test(tmp_path):
    """The strategy by its name, which only the import of lightning_sg makes known."""
    config = ["--config", "configs/digits_2stages.yaml", "--trainer.strategy=synthetic_gradients"]
    quick = [
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    fitted = run_cli("fit", *config, *quick, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3")
    assert fitted.returncode == 0, fitted.stdout
    assert "Starting with 2 processes" in fitted.stdout
    [checkpoint] = tmp_path.rglob("best.ckpt")
    assert len(list(tmp_path.rglob("config.yaml"))) == 1

    # One process loads what two have saved.
    tested = run_cli("test", *config, *quick, "--trainer.devices=1", "--ckpt_path", str(checkpoint))
    assert tested.returncode == 0, tested.stdout
    assert "test_accuracy" in tested.stdout


def test_two_processes_end_when_files_are_missing(tmp_path):
    arguments = ["--config", "configs/mnist_2stages.yaml", f"--data.root={tmp_path}", "--trainer.logger=false"]
    failed = run_cli("fit", *arguments, f"--trainer.default_root_dir={tmp_path}")
    assert failed.returncode != 0
    assert "train-images-idx3-ubyte" in failed.stdout
