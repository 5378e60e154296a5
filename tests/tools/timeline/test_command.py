"""The command ``timeline``: what it reads, draws and prints, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_sg import SyntheticGradients, Timeline
from lightning_sg.cli import main
from lightning_sg.tools.timeline.command import read
from lightning_sg.tools.timeline.spans import batches_of, shares_of
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks


def test_one_process_is_recorded_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Timeline(tmp_path, skip=2, batches=3)
    make_trainer(max_steps=9, profiler=profiler, callbacks=[SyntheticGradients()]).fit(Classifier(), loader())
    stages = read(tmp_path)
    assert list(stages) == ["one process"]
    assert len(batches_of(stages["one process"])) == 3
    assert {"compute", "predictor"} <= shares_of(stages["one process"]).keys()
    assert "compute" in profiler.summary()
    main(["timeline", str(tmp_path), "--batches", "2"])
    printed = capsys.readouterr().out
    assert "ms a batch" in printed
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]


def record(folder: Path) -> None:
    trainer = make_trainer(
        strategy="synthetic_gradients",
        devices=2,
        max_steps=9,
        profiler=Timeline(folder, skip=2, batches=4),
        callbacks=[SyntheticGradients()],
    )
    trainer.fit(Classifier(), loader())


def test_processes_of_a_split_run_share_one_clock(tmp_path: Path) -> None:
    run_ranks(2, partial(record, tmp_path))
    stages = read(tmp_path)
    assert list(stages) == ["process 0 (rank 1)", "process 1 (rank 0)"]
    first, last = stages.values()
    assert {"compute", "predictor", "wait", "send"} <= shares_of(first).keys()
    assert {"compute", "wait", "send", "fake tensors"} <= shares_of(last).keys()
    # The clocks agree: a stage cannot finish a batch before the stage above it has started it.
    for before, after in zip(batches_of(first), batches_of(last)):
        assert before.start < after.end


@pytest.mark.parametrize("content", [None, "no trace", json.dumps({"traceEvents": [{"ph": "X"}]})])
def test_exits_with_the_reason(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "fit-timeline-0.json").write_text(content)
    with pytest.raises(SystemExit, match=r"has no trace of a training batch|is not a trace in the Chrome format"):
        main(["timeline", str(tmp_path)])
