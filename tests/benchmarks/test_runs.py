"""What there is to run: planned once, resumed from a file, refused if the file is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import accuracy, runs
from benchmarks.runs import Run, execute, read, run_of
from benchmarks.tasks import BACKPROPAGATION, WHOLE
from tests.benchmarks.records import DEFAULT, base, record_of


def test_backpropagation_runs_once_for_all_splits():
    options = SimpleNamespace(
        seeds=[0, 1],
        tasks=["hard-mlp-6"],
        learning_rates=[1e-3, 3e-3],
        methods=[BACKPROPAGATION, DEFAULT],
        splits=None,
        budget=1.0,
    )
    planned = accuracy.plan(options)
    assert len(planned) == len(set(planned)) == 2 * 2 * (1 + 2)
    assert {run.split for run in planned if run.method == BACKPROPAGATION} == {WHOLE}
    assert {run.split for run in planned if run.method == DEFAULT} == {"every", "four"}


def test_resume_skips_what_the_file_has(tmp_path, monkeypatch):
    started = []

    def fake(module: str, arguments: list[str]) -> list[dict[str, Any]]:
        run = Run(**json.loads(arguments[arguments.index("--run") + 1]))
        started.append(run)
        if run.seed == 2:
            raise RuntimeError("out of luck")
        return [record_of(run, None if run.seed == 1 else 1.0)]

    monkeypatch.setattr(runs, "run_workers", fake)
    planned = [Run("regression", "3 stages", DEFAULT, seed, 1e-3) for seed in (0, 1, 2)]
    path = tmp_path / "results.jsonl"
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        execute(planned, path, [], jobs=2)
    assert [run_of(record) for record in sorted(read(path), key=lambda record: record["seed"])] == planned[:2]
    started.clear()
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        execute(planned, path, [])
    assert started == planned[2:]  # a diverged run is a result, a failed one is not
    started.clear()
    other = [replace(planned[0], learning_rate=3e-3), replace(planned[0], budget=2.0), replace(planned[0], devices=2)]
    execute([*other, other[0]], path, [])
    assert started == other


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(base(0, 1.0)) + '\n{"task": "mni')
    with pytest.raises(ValueError, match=r"Line 2 of .*results\.jsonl"):
        read(path)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="Line 1"):
        read(path)


def test_missing_folder_is_named():
    options = SimpleNamespace(mnist=None, shakespeare="here")
    assert runs.folder_arguments(options, [None, "shakespeare"]) == ["--shakespeare", "here"]
    with pytest.raises(SystemExit, match="--mnist"):
        runs.folder_arguments(options, ["mnist"])
