"""The pictures and the page of a report: which are made, and that they are intact."""

from __future__ import annotations

import pytest

from lightning_sg.tools.report import report
from lightning_sg.tools.report.run import METRICS
from tests.tools.report.runs import ODD, Checked, make_run, size_of_png, write


def test_files_are_intact_and_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "<script>", ODD)
    made = report(run, [make_run(tmp_path / "plain", loss=0.5)])
    assert [path.name for path in made.paths] == [
        *("report.html", "metrics.png", "alignment.png", "boundaries.png", "events.png")
    ]
    assert all(path.parent == run / "report" for path in made.paths)
    page = Checked(made.paths[0].read_text(encoding="utf-8"))
    assert page.images == [path.read_bytes() for path in made.paths[1:]]
    for image in page.images:
        width, height = size_of_png(image)
        assert width > 600
        assert height > 200
    assert {"b", "script", "red"}.isdisjoint(page.tags)
    for name in ODD:
        assert any(name == text for text in page.texts), name


@pytest.mark.parametrize("count", [1, 6, 45])
def test_any_number_of_boundaries(tmp_path, count):
    names = [f"net.{place}" for place in range(count)]
    made = report(make_run(tmp_path, names, steps=25, keys=("cosine", "cost")))
    assert len(made.paths) == 4
    assert list(made.boundaries) == names
    width, height = size_of_png((tmp_path / "report" / "alignment.png").read_bytes())
    assert max(width, height) < 3000


def test_run_without_boundaries_has_metrics_and_a_note(tmp_path):
    made = report(make_run(tmp_path))
    assert [path.name for path in made.paths] == ["report.html", "metrics.png"]
    assert "had no boundaries" in made.paths[0].read_text(encoding="utf-8")


def test_single_values_zeros_nan_infinity_and_many_baselines(tmp_path):
    write(tmp_path / "one" / METRICS, [{"step": 0, "loss": 0.0, "sg/n/bias": 0.0, "sg/n/cosine": "nan", "x": ""}])
    assert [path.name for path in report(tmp_path / "one").paths][1:] == [
        "metrics.png",
        "alignment.png",
        "boundaries.png",
    ]
    write(tmp_path / "none" / METRICS, [{"step": step, "loss": "inf", "sg/n/guarded": 1} for step in range(3)])
    assert len(report(tmp_path / "none", [tmp_path / "one"] * 8).paths) == 3
    write(tmp_path / "only" / METRICS, [{"step": step, "sg/n/cosine": 0.1} for step in range(3000)])
    assert [path.name for path in report(tmp_path / "only").paths][1:] == ["alignment.png", "boundaries.png"]


def test_users_matplotlib_settings_are_unchanged(tmp_path):
    import matplotlib

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    report(make_run(tmp_path, ["n"], keys=("cost",)))
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend(auto_select=False) == backend
