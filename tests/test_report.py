"""Reports: runs are read, numbers are right, files are whole, and what cannot be reported is said."""

from __future__ import annotations

import base64
import csv
import math
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from lightning_sg import cli
from lightning_sg.tools.report import ReportError, read_run, report
from lightning_sg.tools.report.compare import boundary_figures, compare, final
from lightning_sg.tools.report.draw import Picture
from lightning_sg.tools.report.read import METRICS, Series, label, natural
from lightning_sg.tools.report.style import not_shown, scale, smooth

ODD = ["a<b>&c", "_orig_mod.net.2", "no $\\frac{$ formula", "[red]x[/red]", "néttö\nα", "x" * 80, "d/e"]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """A metrics.csv as CSVLogger writes it: sorted columns, empty where nothing was logged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_run(
    folder: Path, boundaries: list[str] = (), steps: int = 60, loss: float = 1.0, keys: tuple[str, ...] = ()
) -> Path:
    """A run of three epochs that logs everything, or ``keys`` of it, at each step."""
    rows: list[dict[str, object]] = []
    for step in range(steps):
        row: dict[str, object] = {"step": step, "epoch": step * 3 // steps, "train_loss": loss + 1 / (1 + step)}
        for place, name in enumerate(boundaries):
            figures = {
                "cosine": 0.5 + 0.01 * place,
                "norm_ratio": 0.1 * (step + 1),
                "bias": 0.02 * (place + 1),
                "variance": 0.5 if step else 0.0,
                "loss": 2.0,
                "cost": 0.25,
                "guarded": float(step < 15 and place == 0),
                "something_new": step,
            }
            if step % 10 == 0:
                figures["bootstrapped_cosine"] = 0.9
            row |= {f"sg/{name}/{key}": value for key, value in figures.items() if not keys or key in keys}
        rows.append(row)
        if step % 20 == 19:
            rows.append({"step": step, "epoch": step * 3 // steps, "val_loss": loss + 10 / (1 + step)})
    write(folder / METRICS, rows)
    return folder


def size_of_png(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk is whole."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + data) == struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0]
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.fixture
def undrawn(monkeypatch):
    """One tiny image instead of the figures, which take a second: for what is not about them."""
    pixel = Picture("pixel", "A pixel", "Nothing.", b"png")
    monkeypatch.setattr("lightning_sg.tools.report.draw.draw", lambda run, baselines: [pixel])


class Checked(HTMLParser):
    """Fails unless every tag is closed; collects text and images."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            source = dict(attrs)["src"] or ""
            assert source.startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(source.split(",", 1)[1], validate=True))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# ---------------------------------------------------------------------- reading


def test_missing_values_keys_and_unknown_keys_are_read(tmp_path):
    path = write(
        tmp_path / METRICS,
        [
            {"step": 4, "epoch": 0, "train_loss": 2.0, "sg/net.2/cosine": 0.1, "sg/net.10/new": 7},
            {"step": 9, "epoch": 0, "val_loss": 1.5},
            {"step": 9, "epoch": 1, "train_loss": 1.0, "sg/net.2/cosine": -0.2},
        ],
    )
    run = read_run(tmp_path)
    assert run.path == path
    assert run.metrics == {"train_loss": Series([4, 9], [2.0, 1.0]), "val_loss": Series([9], [1.5])}
    assert list(run.boundaries) == ["net.2", "net.10"]
    assert run.boundaries["net.2"] == {"cosine": Series([4, 9], [0.1, -0.2])}
    assert run.boundaries["net.10"] == {"new": Series([4], [7.0])}
    assert (run.epochs, run.first_step, run.last_step, run.notes) == (2, 4, 9, [])
    assert read_run(path).metrics == run.metrics


def test_newest_version_is_taken_and_named(tmp_path):
    for version in (2, 9, 10):
        write(tmp_path / f"version_{version}" / METRICS, [{"step": 0, "loss": float(version)}])
    run = read_run(tmp_path)
    assert run.metrics["loss"].values == [10.0]
    assert "version_10" in run.notes[0]
    (tmp_path / "version_11").mkdir()
    run = read_run(tmp_path)
    assert run.path.parent.name == "version_10"
    assert "version_11 has nothing logged" in run.notes[0].replace(str(tmp_path) + "/", "")


def test_resumed_run_counts_the_later_row(tmp_path):
    write(
        tmp_path / METRICS, [{"step": step, "loss": value} for step, value in ((0, 3.0), (5, 2.0), (3, 9.0), (5, 1.0))]
    )
    assert read_run(tmp_path).metrics["loss"] == Series([0, 3, 5], [3.0, 9.0, 1.0])


def test_damaged_file_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / METRICS).write_text("epoch,step,loss,other\n0,1,2.5,1\n0,two,1,1\n\n0,3,oops,2\n0,4,1.5,3,9\n0,5,1")
    run = read_run(tmp_path)
    assert run.metrics == {"loss": Series([1], [2.5]), "other": Series([1, 3], [1.0, 2.0])}
    assert "3 damaged row(s)" in run.notes[0]
    assert "1 cell(s)" in run.notes[1]


def test_nan_that_was_logged_is_told_and_nan_for_missing_is_not(tmp_path):
    write(tmp_path / "a" / METRICS, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 2, "val": 3}])
    run = read_run(tmp_path / "a")
    assert "loss was NaN or infinite at 1 logged step(s), the first at step 2" in run.notes[0]
    assert math.isnan(final(run.metrics["loss"], smoothed=True))
    write(tmp_path / "b" / METRICS, [{"step": 1, "loss": 1.0, "val": "nan"}, {"step": 2, "loss": "nan", "val": 2}])
    run = read_run(tmp_path / "b")
    assert run.notes == []
    assert run.metrics == {"loss": Series([1], [1.0]), "val": Series([2], [2.0])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"step,epoch,loss\r\n", "has no values"),
        (b"step,epoch,loss\r\n0,0,\r\n", "has no values"),
        (b"a,b\r\n1,2\r\n", "no column 'step'"),
        (b"step,loss\n\xff\xfe\x00", "not a text file"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, content, message):
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(ReportError, match=message):
        read_run(tmp_path)


def test_folder_without_metrics_names_the_runs_below_it(tmp_path):
    with pytest.raises(ReportError, match=r"has no metrics\.csv\. Give the folder"):
        read_run(tmp_path)
    make_run(tmp_path / "mnist" / "version_0")
    with pytest.raises(ReportError, match=r"runs below it: .*version_0"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="does not exist"):
        read_run(tmp_path / "nothing")


def test_tensorboard_run(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="run")
    for step in range(3):
        logger.log_metrics({"loss": 1.0 / (1 + step), "sg/net.2/cosine": 0.5, "epoch": step}, step)
    logger.finalize("success")
    for path in (tmp_path / "run", next((tmp_path / "run").rglob("*tfevents*"))):
        run = read_run(path)
        assert run.metrics["loss"].values == pytest.approx([1, 1 / 2, 1 / 3])
        assert run.boundaries["net.2"]["cosine"].steps == [0, 1, 2]
        assert run.epochs == 3


def test_tensorboard_is_named_when_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ReportError, match="pip install tensorboard"):
        read_run(tmp_path)


def test_labels_are_short_and_unique(tmp_path):
    runs = [read_run(make_run(tmp_path / name)) for name in ("a/x/version_0", "a/y/version_0", "b/y/version_0")]
    label(runs)
    assert [run.label for run in runs] == ["a/x/version_0", "a/y/version_0", "b/y/version_0"]
    label(runs[:2])
    assert [run.label for run in runs[:2]] == ["x/version_0", "y/version_0"]
    label([runs[0], runs[0]])
    assert runs[0].label.endswith("(2)")


def test_names_are_ordered_by_their_numbers():
    assert sorted(["net.10", "net.2", "a", "net", "10", "net.2.b"], key=natural) == [
        *("10", "a", "net", "net.2", "net.2.b", "net.10")
    ]


# ---------------------------------------------------------------------- numbers


def test_comparison_of_hand_made_runs(tmp_path):
    values = [float(value) for value in range(100)]
    run = [{"step": step, "epoch": 0, "train_loss": value} for step, value in enumerate(values)]
    run += [{"step": 99, "epoch": 0, "val_loss": 0.75}, {"step": 99, "epoch": 0, "only": 1.0}]
    other = [{"step": step, "epoch": 0, "train_loss": 2 * value} for step, value in enumerate(values)]
    other += [{"step": 99, "epoch": 0, "val_loss": 0.5}]
    write(tmp_path / "run" / METRICS, run)
    write(tmp_path / "other" / METRICS, other)
    rows = {row.metric: row for row in compare(read_run(tmp_path / "run"), [read_run(tmp_path / "other")])}
    assert list(rows) == ["train_loss", "val_loss", "only"]
    assert rows["train_loss"].smoothed
    assert rows["train_loss"].values == [94.5, 189.0]  # the median of 90 ... 99, and twice that
    assert rows["train_loss"].differences == [-94.5]
    assert not rows["val_loss"].smoothed
    assert rows["val_loss"].values == [0.75, 0.5]
    assert rows["val_loss"].differences == [0.25]
    assert rows["only"].values == [1.0, None]
    assert rows["only"].differences == [None]


def test_figures_of_a_boundary(tmp_path):
    figures = boundary_figures(read_run(make_run(tmp_path, ["net.1"])))["net.1"]
    assert figures["norm_ratio"].final == pytest.approx(5.75)  # the median of 5.5 ... 6.0
    assert figures["norm_ratio"].median == pytest.approx(3.05)
    assert (figures["cost"].final, figures["bootstrapped_cosine"].final) == (0.25, 0.9)
    assert figures["guarded"].median == 0.25  # 15 of 60


def test_unequal_lengths_and_baselines_with_boundaries_are_told(tmp_path, undrawn):
    run, baseline = make_run(tmp_path / "run", ["n"]), make_run(tmp_path / "baseline", ["n"], steps=40)
    notes = " ".join(report(run, [baseline], tmp_path / "out").notes)
    assert "ends at step 59, the baseline baseline at step 39" in notes
    assert "not plain backpropagation" in notes


# ---------------------------------------------------------------------- files


def test_files_are_whole_and_names_are_escaped(tmp_path):
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


def test_without_boundaries_metrics_are_drawn_and_that_is_said(tmp_path):
    made = report(make_run(tmp_path))
    assert [path.name for path in made.paths] == ["report.html", "metrics.png"]
    assert "had no boundaries" in made.paths[0].read_text(encoding="utf-8")


def test_one_row_zeros_nan_and_many_baselines(tmp_path):
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


def test_logarithmic_axes_where_values_ask_for_it():
    axes = MatplotlibFigure().subplots()
    wide = Series(list(range(100)), [0.0, *(10.0 ** (place % 4) for place in range(99))])
    assert not scale(axes, [Series([0, 1], [1.0, 9.0])])
    assert not scale(axes, [Series([0, 1], [0.0, 900.0])])
    assert not scale(axes, [Series([0, 1], [-1.0, math.nan])])
    assert axes.get_yscale() == "linear"
    assert scale(axes, [wide])
    assert axes.get_yscale() == "log"
    assert not_shown([wide]) == "1 value(s) ≤ 0 not shown"


def test_smoothed_lines_are_short_and_pass_over_nan():
    few = Series([0, 1, 2], [1.0, math.inf, 3.0])
    assert str(smooth(few)[1].tolist()) == "[1.0, nan, 3.0]"
    spiky = Series(
        list(range(100_001)), [math.nan if step % 7 == 0 else float(step % 50 == 1) for step in range(100_001)]
    )
    steps, values = smooth(spiky)
    assert len(steps) == len(values) <= 2000
    assert (steps[1:] > steps[:-1]).all()
    assert (values == 0).all()


def test_matplotlib_settings_of_the_program_stay(tmp_path):
    import matplotlib

    before, backend = dict(matplotlib.rcParams), matplotlib.rcParams._get("backend")
    report(make_run(tmp_path, ["n"], keys=("cost",)))
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.rcParams._get("backend") == backend


# ---------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def no_own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sg"])


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", ["100", "30"])
def test_command_prints_numbers_and_paths(tmp_path, undrawn, monkeypatch, capsys, rich, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(cli, "_JSONARGPARSE", False)  # which it does not need
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    run = make_run(tmp_path / "[bold]run", ["net.1", "[red]x[/red]"])
    baseline = make_run(tmp_path / "plain", loss=0.75)
    cli.main(["report", str(run), "--baseline", str(baseline), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"val_loss +1\.167 +0\.9167 +\+0\.25", printed)
    assert re.search(r"net\.1 +0\.5 +5\.75 +0\.02 +0\.5 +25 % +25 %", printed)
    assert "[red]x" in printed
    for name in ("report.html", "pixel.png"):
        assert f"Written: {tmp_path / 'out' / name}\n" in printed
        assert (tmp_path / "out" / name).stat().st_size


def test_command_reads_the_arguments_of_the_process(tmp_path, undrawn, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["lightning-sg", "report", str(run)])
    cli.main()
    assert "report.html" in capsys.readouterr().out


def test_several_baselines_in_either_way_of_writing(tmp_path, undrawn, capsys):
    run, a, b, c = (str(make_run(tmp_path / name)) for name in ("run", "a", "b", "c"))
    cli.main(["report", run, "--baseline", a, b, "--baseline", c])
    page = Checked((tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.texts.count("difference") == 3


@pytest.mark.parametrize("arguments", [["report", "--help"], ["--help"]])
def test_help_names_the_report(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    assert "lightning-sg report" in capsys.readouterr().out


def test_command_says_what_is_wrong(tmp_path, undrawn, monkeypatch):
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["report", str(tmp_path / "nothing")])
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["report", str(run), "--baseline", str(tmp_path / "nothing")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot be written"):
        cli.main(["report", str(run), "--out", str(tmp_path / "file")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=re.escape('pip install "lightning-sg[report]"')):
        cli.main(["report", str(run)])
