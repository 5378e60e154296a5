"""The timeline: what is recorded, how it divides into kinds of work, and the command that draws it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.profilers import SimpleProfiler

from lightning_sg import SyntheticGradients, Timeline, profiling
from lightning_sg.cli import main
from lightning_sg.profiling import BATCH, EPOCH, LIGHTNING, kind_of
from lightning_sg.tools.timeline.command import read
from lightning_sg.tools.timeline.spans import Piece, Span, batches_of, pieces_of, shares_of
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("[Strategy]SingleDeviceStrategy.training_step", "compute"),
        ("[LightningModule]Net.optimizer_step", "compute"),
        ("[_TrainingEpochLoop].train_dataloader_next", "data"),
        (profiling.WAIT_TARGET, "wait"),
        (profiling.LEARN, "predictor"),
        ("[Callback]Timer.on_train_batch_end", LIGHTNING),
        (BATCH, LIGHTNING),
    ],
)
def test_actions_have_kinds(action: str, kind: str) -> None:
    assert kind_of(action) == kind


def test_of_nested_spans_the_innermost_counts() -> None:
    spans = [
        Span("x.training_step", 1.0, 3.0),
        Span(BATCH, 0.0, 10.0),
        Span(profiling.PREDICT, 2.0, 1.0),
        Span("x.backward", 4.0, 2.0),
        Span(EPOCH, -1.0, 20.0),
        Span("x.validation_step", 10.0, 1.0),
        Span("x.train_dataloader_next", 11.5, 0.5),
        Span(BATCH, 12.0, 1.0),
    ]
    assert pieces_of(spans) == [
        Piece(LIGHTNING, 0.0, 1.0),
        Piece("compute", 1.0, 2.0),
        Piece("predictor", 2.0, 3.0),
        Piece("compute", 3.0, 6.0),
        Piece(LIGHTNING, 6.0, 10.0),
        Piece("data", 11.5, 12.0),
        Piece(LIGHTNING, 12.0, 13.0),
    ]
    shares = shares_of(spans)
    assert shares == pytest.approx(
        {"compute": 4 / 11.5, "predictor": 1 / 11.5, "data": 0.5 / 11.5, LIGHTNING: 6 / 11.5}
    )
    assert pieces_of([]) == []
    assert shares_of([]) == {}


def test_only_the_window_is_kept_and_what_an_exception_leaves_open_ends_with_its_parent() -> None:
    profiler = Timeline(skip=1, batches=2)
    for _ in range(4):
        with profiler.profile(BATCH):
            profiler.start("left open")
    assert [span.name for span in profiler.spans] == ["left open", BATCH] * 2


@pytest.mark.parametrize("arguments", [{"skip": -1}, {"batches": 0}])
def test_an_empty_window_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="skip >= 0 and batches >= 1"):
        Timeline(**arguments)


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


def _record(folder: Path) -> None:
    trainer = make_trainer(
        strategy="synthetic_gradients",
        devices=2,
        max_steps=9,
        profiler=Timeline(folder, skip=2, batches=4),
        callbacks=[SyntheticGradients()],
    )
    trainer.fit(Classifier(), loader())


def test_the_stages_of_a_split_run_are_side_by_side_in_one_time(tmp_path: Path) -> None:
    run_ranks(2, partial(_record, tmp_path))
    stages = read(tmp_path)
    assert list(stages) == ["process 0 (rank 1)", "process 1 (rank 0)"]
    first, last = stages.values()
    assert {"compute", "predictor", "wait", "send"} <= shares_of(first).keys()
    assert {"compute", "wait", "send", "ghosts"} <= shares_of(last).keys()
    # A stage cannot end its work on a batch before the stage before has begun it: the clocks agree.
    for before, after in zip(batches_of(first), batches_of(last)):
        assert before.start < after.end


def _profile() -> list[str]:
    profiler = SimpleProfiler()
    trainer = make_trainer(strategy="synthetic_gradients", devices=2, max_steps=3, profiler=profiler)
    trainer.fit(Classifier(), loader())
    return list(profiler.recorded_durations)


def test_lightnings_own_profiler_sees_waiting_and_sending() -> None:
    last, first = run_ranks(2, _profile)
    assert {profiling.WAIT_ACTIVATIONS, profiling.SEND, profiling.GHOSTS} <= set(last)
    assert {profiling.WAIT_TARGET, profiling.SEND, profiling.PREDICT, profiling.LEARN} <= set(first)


@pytest.mark.parametrize("content", [None, "no trace", json.dumps({"traceEvents": [{"ph": "X"}]})])
def test_the_command_says_what_is_wrong(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "fit-timeline-0.json").write_text(content)
    with pytest.raises(SystemExit, match=r"has no trace of a training batch|is not a trace in the Chrome format"):
        main(["timeline", str(tmp_path)])
