"""What loggers get: settings and choices once, a compact set of metrics, constants once."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_sg import ExactGradients, PredictorTraining, SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.predictors import AutoPredictor
from lightning_sg.settings import Settings
from lightning_sg.settings_log import as_config
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks

NAMES = ["net.1", "net.3", "net.5"]


def train(
    folder: Path, callback: SyntheticGradients, module: Classifier | None = None, **arguments: Any
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The config and the rows that a CSVLogger has of a short run."""
    trainer = make_trainer(
        logger=CSVLogger(folder, name="run", version=0), callbacks=[callback], log_every_n_steps=1, **arguments
    )
    trainer.fit(module or Classifier(), loader())
    if not trainer.is_global_zero:
        return {}, []
    config = yaml.safe_load((folder / "run" / "version_0" / "hparams.yaml").read_text())
    with (folder / "run" / "version_0" / "metrics.csv").open() as file:
        return config["sg"], list(csv.DictReader(file))


def test_settings_and_choices_are_in_the_config(tmp_path: Path) -> None:
    config, _rows = train(tmp_path, SyntheticGradients(delay=2, exact=ExactGradients(every=3)))
    assert config["delay"] == 2
    assert config["exact"]["every"] == 3
    assert config["training"]["optimizer"] is None
    assert list(config["boundaries"]) == NAMES
    for chosen in config["boundaries"].values():
        assert "LossModelPredictor" in chosen["predictor"]
        assert chosen["stage_parameters"] > 0


def test_a_split_run_names_its_strategy(tmp_path: Path) -> None:
    alone, _ = train(tmp_path / "one", SyntheticGradients())

    def work() -> Any:
        strategy = SyntheticGradientStrategy(wire="bf16", timeout=60)
        return train(tmp_path / "two", SyntheticGradients(), devices=2, strategy=strategy)[0]

    split = run_ranks(2, work)[0]
    assert [chosen["stage_parameters"] for chosen in split["boundaries"].values()] == [
        chosen["stage_parameters"] for chosen in alone["boundaries"].values()
    ]
    assert split["boundaries"]["net.1"]["predictor"] == "AutoPredictor"  # another process has chosen
    assert split["strategy"]["wire"] == "bf16"
    assert split["strategy"]["devices"] == 2
    assert "strategy" not in alone


@pytest.mark.parametrize("metrics", ["compact", "all"])
def test_few_metrics_unless_all_are_asked_for(metrics: Any, tmp_path: Path) -> None:
    _config, rows = train(tmp_path, SyntheticGradients(metrics=metrics))
    logged = set(rows[0])
    for name in NAMES:
        assert {f"sg/{name}/cosine", f"sg/{name}/norm_ratio", f"sg/{name}/cost"} <= logged
        for detail in ("loss", "bias", "variance"):
            assert (f"sg/{name}/{detail}" in logged) == (metrics == "all")
        assert sum(bool(row[f"sg/{name}/cost"]) for row in rows) == 1  # it is constant


class TwoStepsABatch(Classifier):
    """Lightning then counts two steps, and logs what a batch logs under one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        for _time in range(2):
            optimizer.step()
        optimizer.zero_grad()


def test_what_goes_past_lightnings_log_has_the_step_that_lightning_gives_to_its_batch(tmp_path: Path) -> None:
    _config, rows = train(tmp_path, SyntheticGradients(), module=TwoStepsABatch())
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == 2 * len(loader()) - 1  # of two epochs


def test_the_mean_cosine_is_that_of_the_boundaries(tmp_path: Path) -> None:
    _config, rows = train(tmp_path, SyntheticGradients())
    compared = 0
    for row in rows:
        cosines = [float(row[f"sg/{name}/cosine"]) for name in NAMES if row[f"sg/{name}/cosine"]]
        if row["sg/cosine"]:
            assert float(row["sg/cosine"]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
            compared += 1
    assert compared > 3


def test_objects_are_written_in_plain_values() -> None:
    training = PredictorTraining(optimizer=torch.optim.Adam)
    settings = as_config(Settings(predictor={"a": AutoPredictor()}, training=training, context=lambda batch: batch))
    assert settings["predictor"]["a"]["class"] == "AutoPredictor"
    assert settings["training"]["optimizer"] == "Adam"
    assert isinstance(settings["context"], str)
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings
