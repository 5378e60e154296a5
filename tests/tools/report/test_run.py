"""Runs: their labels and the order of their names."""

from __future__ import annotations

from lightning_sg.tools.report import read_run
from lightning_sg.tools.report.run import Run, label, natural
from tests.tools.report.runs import make_run


def test_labels_are_short_and_unique(tmp_path):
    runs = [read_run(make_run(tmp_path / name)) for name in ("a/x/version_0", "a/y/version_0", "b/y/version_0")]
    label(runs)
    assert [run.label for run in runs] == ["a/x/version_0", "a/y/version_0", "b/y/version_0"]
    label(runs[:2])
    assert [run.label for run in runs[:2]] == ["x/version_0", "y/version_0"]
    label([runs[0], runs[0]])
    assert runs[0].label.endswith("(2)")


def test_numbers_in_names_are_sorted_as_numbers():
    assert sorted(["net.10", "net.2", "a", "net", "10", "net.2.b"], key=natural) == [
        *("10", "a", "net", "net.2", "net.2.b", "net.10")
    ]


def test_a_run_of_weights_and_biases_is_called_by_its_folder(tmp_path):
    paths = [tmp_path / name / f"run-{name}.wandb" for name in ("offline-run-1-a", "offline-run-2-b")]
    runs = [Run(path, {}, {}) for path in paths]
    label(runs)
    assert [run.label for run in runs] == ["offline-run-1-a", "offline-run-2-b"]
