"""The panels for Weights & Biases: there is one for everything that a run logs."""

from __future__ import annotations

import json
import re

import pytest
from lightning.pytorch.loggers import CSVLogger

from examples.wandb_workspace import PANELS, main
from lightning_sg import ExactGradients, SyntheticGradients
from lightning_sg.tools.report import read_run
from tests.models import Classifier, loader, make_trainer

#: Not over time: a constant, and the mean over boundaries, which the panel of the cosines shows.
LEFT_OUT = {"cost", "sg/cosine"}


def test_everything_that_is_logged_has_a_panel(tmp_path):
    callback = SyntheticGradients(metrics="all", exact=ExactGradients(every=2))
    trainer = make_trainer(logger=CSVLogger(tmp_path, name="run"), callbacks=[callback], log_every_n_steps=1)
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    expressions = [names for panels in PANELS.values() for _title, names in panels]
    logged = read_run(tmp_path / "run").series()
    assert len(logged) > 10
    for name in logged:
        panels = [each for each in expressions if re.search(each, name)]
        expected = 0 if LEFT_OUT & {name, name.rpartition("/")[2]} else 1
        assert len(panels) == expected, name


def test_the_workspace_can_be_made(capsys):
    pytest.importorskip("wandb_workspaces")
    main(["me", "digits", "--print"])
    made = capsys.readouterr().out
    sections = json.loads(made)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections if section["panels"]] == ["Summary", *PANELS]
    shown = [panel["config"].get("metricRegex") for section in sections for panel in section["panels"]]
    assert {names for panels in PANELS.values() for _title, names in panels} <= set(shown)
